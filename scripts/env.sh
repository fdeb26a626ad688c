# Sourced by the other scripts: makes .venv with the pinned packages of a requirements file, once.

# make_venv REQUIREMENTS: (re)installs only when the file changed since the last time.
make_venv() {
    local requirements=$1 python=${PYTHON:-python3} stamp
    stamp=".venv/.installed-$(cat requirements*.txt "$requirements" | cksum | tr ' ' '-')-$(basename "$requirements")"
    [ -e "$stamp" ] && return
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
        echo "$python is older than Python 3.10; set PYTHON to a newer one" >&2
        return 2
    }
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    echo "installing $requirements into .venv" >&2
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements"
    touch "$stamp"
}
