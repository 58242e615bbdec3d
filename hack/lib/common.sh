# shellcheck shell=bash
# What every script in hack/ starts with: strict mode, where things are, how to speak, how to fail. Source it first.
set -Eeuo pipefail
# No script ends without a word.
trap 'printf "%s: error: line %s: %s\n" "$program" "$LINENO" "$BASH_COMMAND" >&2' ERR

# shellcheck disable=SC2034 # for the scripts
REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# Everything that is downloaded or built lives here, never in the clone.
FLINT_CACHE=${FLINT_CACHE:-${HOME:-/root}/.cache/flint}
export FLINT_CACHE
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$FLINT_CACHE/target}
# rustup's cargo goes before a distribution's, which knows nothing of rust-toolchain.toml.
PATH=$FLINT_CACHE/tools/bin:${CARGO_HOME:-${HOME:-/root}/.cargo}/bin:$PATH

program=${0##*/}
scratch=''

say() { printf '%s: %s\n' "$program" "$*" >&2; }

# die WHAT [NEXT STEP...]: what went wrong on the first line, what to do about it on the next ones.
die() {
    say "error: $1"
    shift
    [ $# -eq 0 ] || printf '    %s\n' "$@" >&2
    exit 1
}

# The comment at the head of a script is its manual page.
print_help() { awk 'NR == 1 { next } !/^#/ { exit } { sub(/^# ?/, ""); print }' "$0"; }

# help_if_asked "$@": prints the manual page and ends where -h or --help comes first.
help_if_asked() {
    case ${1-} in
        -h | --help) print_help && exit 0 ;;
    esac
}

usage_error() {
    say "$1"
    echo "    $0 --help tells more" >&2
    exit 2
}

# step WHAT COMMAND...: runs COMMAND and says how long it took.
step() {
    local what=$1 begin=$EPOCHREALTIME
    shift
    say "$what ..."
    "$@"
    say "$what: $(seconds_since "$begin") s"
}

# seconds_since EPOCHREALTIME: with one decimal.
seconds_since() {
    local us=$((${EPOCHREALTIME//[.,]/} - ${1//[.,]/}))
    printf '%d.%d' $((us / 1000000)) $((us / 100000 % 10))
}

need_root() {
    [ "$(id -u)" -eq 0 ] || die "this needs root" "run it again as root: sudo -E $0"
}

# need_file FILE HOW: FILE, or an error that says how to get it.
need_file() { [ -e "$1" ] || die "$1 is missing" "$2"; }

# hold_lock NAME: one process at a time until this one ends; says so where it has to wait. The lock is the open file,
# which children inherit: start nothing that outlives the script while it is held.
hold_lock() {
    local fd
    mkdir -p "$FLINT_CACHE/locks"
    exec {fd}>"$FLINT_CACHE/locks/$1"
    flock -n "$fd" && return
    say "waiting for another process that holds $1"
    flock "$fd"
}

# scratch_dir: a folder beside the results, so that a finished result is moved into place in one step. Gone at exit.
scratch_dir() {
    mkdir -p "$FLINT_CACHE/tmp"
    scratch=$(mktemp -d "$FLINT_CACHE/tmp/$program.XXXXXX")
    trap 'rm -rf "$scratch"' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
}

# publish NEW PLACE: puts the finished folder NEW at PLACE.
publish() {
    rm -rf "$2"
    mkdir -p "$(dirname "$2")"
    mv "$1" "$2"
}
