# shellcheck shell=bash
# A registry with the test images and a flintd, for scripts that show or measure Flint. Source common.sh first.

# start_flintd: starts both from $FLINT_CACHE/out, in folders of their own under /run, and returns when flintd answers. The
# programs are in PATH then, FLINT_SOCKET is set, $work is the folder. Both end when the script does.
start_flintd() {
    local line
    # Not local: the trap outlives the function.
    declare -g work daemon=''
    work=$(mktemp -d "/run/flint-${program:?}.XXXXXX")
    trap stop_flintd EXIT

    # In memory: the emulated host reads its disk slowly.
    cp -r "$FLINT_CACHE/out/bin" "$work/bin"
    cp -rL "$FLINT_CACHE/out/guest" "$work/guest"
    PATH=$work/bin:$PATH
    export FLINT_SOCKET=$work/flintd.sock
    "$REPO/hack/registry" start >/dev/null

    # flintd says on its standard output when it is ready.
    mkfifo "$work/ready"
    flintd --state-dir "$work/state" --run-dir "$work/run" --listen "$FLINT_SOCKET" --vmm "$work/bin/flint-vmm" \
        --kernel "$work/guest/vmlinux" --initrd "$work/guest/initrd" >"$work/ready" 2>"$work/flintd.log" &
    daemon=$!
    exec 3<"$work/ready"
    while read -r -t 60 -u 3 line && [[ $line != *ready* ]]; do :; done
    [[ ${line-} = *ready* ]] || die "flintd did not get ready" "its log ends with:" "$(flintd_log)"
}

flintd_log() { tail -n 20 "$work/flintd.log"; }

stop_flintd() {
    [ -z "$daemon" ] || { kill "$daemon" 2>/dev/null && wait "$daemon" 2>/dev/null; } || true
    "$REPO/hack/registry" stop
    rm -rf "$work"
}
