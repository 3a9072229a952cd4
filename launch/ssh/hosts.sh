#!/usr/bin/env bash
# Rendered from launch/ssh: change parameters, not this file.
# One launcher on each host. Signals to this script go to the launchers; if one ends badly, the others are stopped.
# Exit status: that of the first that failed; otherwise 75 if state was saved (run this again to go on); otherwise 0.
set -u
PREEMPTED=75

hosts=(@{hosts})
addresses=(@{addresses})
ssh=(@{ssh})
command=(env @{environment} @{launcher})
options=(
    --nproc-per-node=@{processes_per_node} --shutdown-timeout=@{shutdown_timeout_s}
    "--signals-to-handle=@{signals}" @{launcher_options}
)
program=(@{script} @{arguments})
working_directory=@{working_directory}
run_id=@{name}-$$

# Runs on the host. Standard input is the life line: a line is a signal for the launcher, and the end (this script, its
# machine or the connection is gone) stops it.
# shellcheck disable=SC2329 # called on the other side
remote() {
    local stop_timeout_s=$1 working_directory=$2 launcher lifeline code
    shift 2
    cd -- "${working_directory:-.}" || return
    set -m # own process groups, in which SIGINT is not ignored
    exec 3<&0
    "$@" </dev/null 3<&- &
    launcher=$!
    {
        while read -r signal <&3; do kill -s "$signal" "$launcher"; done
        kill -s TERM "$launcher"
        sleep "$stop_timeout_s"
        kill -s KILL "$launcher"
    } >/dev/null 2>&1 &
    lifeline=$!
    set +m
    disown "$lifeline"
    wait "$launcher"
    code=$?
    kill -s KILL -- "-$lifeline"
    return "$code"
}

quote() { # words for any POSIX shell
    local word quote="'\\''"
    for word in "$@"; do printf "'%s' " "${word//\'/$quote}"; done
}

start() { # the launcher of one host; reports "index status"
    local index=$1 line rendezvous words
    trap '' HUP INT QUIT TERM USR1 USR2 # a terminal sends to the whole group: ssh has to stay, and the script passes on
    for line in "${lines[@]}"; do exec {line}>&-; done
    if ((${#hosts[@]} == 1)); then
        rendezvous=(--standalone)
    else
        rendezvous=(
            --nnodes="${#hosts[@]}" --rdzv-backend=c10d --rdzv-endpoint="${addresses[0]}:@{port}" --rdzv-id="$run_id"
            --rdzv-conf="is_host=$((index == 0)),join_timeout=@{join_timeout_s},read_timeout=@{join_timeout_s}"
            --local-addr="${addresses[index]}"
        )
    fi
    # shellcheck disable=SC2016 # the remote bash expands "$@"
    words=("$(declare -f remote)"$'\n''remote "$@"' remote @{stop_timeout_s} "$working_directory")
    words+=("${command[@]}" "${rendezvous[@]}" "${options[@]}" "${program[@]}")
    "${ssh[@]}" "${hosts[index]}" "exec bash -c $(quote "${words[@]}")" 9>&-
    echo "$index $?" >&9
}

forward() {
    local line
    [[ $1 == USR2 ]] || told=1 # SIGUSR2 asks for a report, all others mean the end
    for line in "${lines[@]}"; do echo "$1" >&"$line"; done 2>/dev/null
}

hang_up() { # ends the life lines: what does not stop then is killed
    local line
    for line in "${lines[@]}"; do exec {line}>&-; done
    lines=()
}

((${#addresses[@]})) || addresses=("${hosts[@]##*@}")
if ((${#addresses[@]} != ${#hosts[@]})); then
    echo "launch: ${#hosts[@]} hosts, but ${#addresses[@]} addresses" >&2
    exit 2
fi

lines=()
told=
trap '' PIPE
for signal in HUP INT QUIT TERM USR1 USR2; do
    # shellcheck disable=SC2064 # the signal of this round
    trap "forward $signal" "$signal"
done
pipes=$(mktemp -d) || exit
trap 'rm -rf -- "$pipes"' EXIT
mkfifo "$pipes/reports"
exec 9<>"$pipes/reports"
exec 8<"$pipes/reports"
for index in "${!hosts[@]}"; do
    mkfifo "$pipes/$index"
    start "$index" <"$pipes/$index" 8<&- &
    exec {line}>"$pipes/$index"
    lines[index]=$line
done
exec 9>&-

status=0
patience=() # once a launcher has ended badly: how long the others may take
running=${#hosts[@]}
while ((running > 0)); do
    read -r "${patience[@]}" index code <&8
    case $? in
        0) ;;
        1)
            echo "launch: lost sight of $running hosts" >&2
            exit 1
            ;;
        *)
            hang_up
            patience=()
            continue
            ;;
    esac
    running=$((running - 1))
    unset "lines[$index]"
    ((code)) || continue
    echo "launch: ${hosts[index]} ended with status $code" >&2
    ((status != 0 && status != PREEMPTED)) || status=$code
    patience=(-t @{stop_timeout_s})
    # Where one has saved its state, the others are about to; where one has failed, they cannot go on.
    [[ $code == "$PREEMPTED" || -n $told ]] || forward TERM
done
exit "$status"
