#!/bin/sh
# The notebooks' Python ($NOTEBOOKS_PYTHON) with limits and, where bubblewrap works, locked into the present folder: it
# sees the system and its own packages, writes only here, and has no network. Without arguments: say if there is no lock.
folder=$PWD
locked() {
    prefixes=$("$NOTEBOOKS_PYTHON" -c "import sys; print(sys.prefix, sys.base_prefix, sep='\n')")
    set -- --bind "$folder" "$folder" --chdir "$folder" "$@"
    IFS='
'
    for path in /usr /bin /sbin /lib /lib32 /lib64 /etc $prefixes; do
        set -- --ro-bind-try "$path" "$path" "$@"
    done
    unset IFS
    exec bwrap --die-with-parent --unshare-all --dev /dev --proc /proc --tmpfs /tmp "$@"
}
ulimit -d 4000000  # KiB of memory, for each process
ulimit -f 2000000  # half KiB of a file
(locked true) 2>/dev/null
unlocked=$?
if [ $# -eq 0 ]; then
    [ $unlocked -eq 0 ] || echo "bubblewrap does not work here: students' code runs with your rights, and can read and" \
        "change your files. If you do not trust it, grade in a container that you throw away."
    exit
fi

# On small images several threads are slower than one, and each processor has a student's notebook to run.
set -- HOME="$folder" PYTHONPATH="$folder" PATH="$PATH" LANG=C.UTF-8 OMP_NUM_THREADS=1 TQDM_DISABLE=1 MPLBACKEND=agg \
    "$NOTEBOOKS_PYTHON" "$@"
[ $unlocked -ne 0 ] && exec env -i JPY_PARENT_PID="$JPY_PARENT_PID" "$@"
ulimit -u 4096  # processes
locked env -i "$@"
