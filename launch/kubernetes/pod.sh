nodes=@{nodes}
@{?environment}export @{environment}
@{?working_directory}cd @{working_directory} || exit
if [ "$nodes" -eq 1 ]; then
    set -- --standalone
else
    is_host=0
    [ "$JOB_COMPLETION_INDEX" -ne 0 ] || is_host=1
    set -- --nnodes="$nodes" --rdzv-backend=c10d --rdzv-endpoint=@{name}-0.@{name}:@{port} --rdzv-id=@{name} \
        --local-addr="$POD_IP" --rdzv-conf="is_host=$is_host,join_timeout=@{join_timeout_s},read_timeout=@{join_timeout_s}"
fi
exec @{launcher} "$@" --nproc-per-node=@{processes_per_node} \
    --signals-to-handle=@{signals} --shutdown-timeout=@{shutdown_timeout_s} @{launcher_options} \
    @{script} @{arguments}
