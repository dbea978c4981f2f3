# shellcheck shell=bash
# What the scripts share.

# grouped COMMAND…: runs it in a process group, of which nothing is left afterwards. A signal to the
# script is dealt with at once; in the foreground it would wait until the command ends.
group=''
grouped() {
    local code=0
    set -m
    "$@" </dev/null &
    group=$!
    set +m
    wait "$group" || code=$?
    kill -KILL -- "-$group" 2>/dev/null || true
    group=''
    return "$code"
}

# end_group [SECONDS]: ends what `grouped` runs: asks it to, and kills it after so long (10).
end_group() {
    local left=$((${1:-10} * 10))
    [ -n "$group" ] && kill -TERM -- "-$group" 2>/dev/null || return 0
    while kill -0 -- "-$group" 2>/dev/null; do
        [ "$left" -gt 0 ] || kill -KILL -- "-$group" 2>/dev/null || return 0
        left=$((left - 1))
        [ "$left" -gt -50 ] || return 0
        sleep 0.1
    done
}

# unusable FOLDER: says why results cannot be written there, if so.
unusable() {
    local place
    place=$(readlink -m -- "$1")
    while [ ! -e "$place" ]; do place=$(dirname "$place"); done
    if [ ! -d "$place" ]; then
        echo "$place is a file; name a folder"
    elif [ ! -w "$place" ]; then
        echo "$place cannot be written to; name another folder"
    fi
}

# test_file NAME: whether a file of tests/, in the current folder, has that name.
test_file() {
    [[ $1 =~ ^[a-z_]+$ ]] && [ -f "tests/$1.rs" ]
}
