#!/bin/sh
echo "worker> $RANK $LOCAL_RANK $WORLD_SIZE $# $*"
