#!/usr/bin/env bash
# Runs `nfnets-xla ARGUMENTS` on every worker, and repeats it while it exits with 75 (interrupted and
# saved) or 143 (interrupted before it had begun), unless the file `stop` exists, or ten such runs in
# a row took less than five minutes each: repeating does not help then. The script holds `lock` while
# it lives; `pid` is the process to signal for a stop; `exit` has the last exit code.
#   bash run.sh HOST:/FOLDER MOUNT ARGUMENTS
set -u
share=$1 mount=$2
shift 2
cd "$(dirname "$0")"
exec 9> lock
flock -n 9 || exit 0 # already running

rm -f stop pid # left by an earlier boot: its pid may be another process now
# A reboot loses the mount. Without it the run would begin anew on the worker's own disk; if it cannot
# be mounted, this script ends as "stopped", and is started again.
mountpoint -q "$mount" || sudo mount -t nfs "$share" "$mount" 9>&- || exit 1
short=0
while :; do
    [ ! -e stop ] || { code=75 && break; } # requested while this script mounted or waited
    echo "$(date -u +%FT%TZ) nfnets-xla $*"
    began=$SECONDS
    venv/bin/nfnets-xla "$@" &
    echo $! > pid
    wait $!
    code=$?
    rm -f pid
    if ((SECONDS - began < 300)); then ((short += 1)); else short=0; fi
    [[ "$code" =~ ^(75|143)$ ]] && [ ! -e stop ] && ((short < 10)) || break
    sleep 10 9>&-
done
echo "$(date -u +%FT%TZ) ended with $code"
echo "$code" > exit.part
mv exit.part exit # so that `exit` is never half-written
