#!/usr/bin/env bash
# On every worker: `nfnets-xla ARGUMENTS`, again for as long as it says that it was interrupted and
# has saved (exit code 75), or was before it had begun (143), unless the file `stop` is there, or ten
# such runs in a row took less than five minutes: that will not pass. While it lives it holds the lock;
# `pid` is the process to ask to stop; `exit` is what it ended with.
#   bash run.sh HOST:/FOLDER MOUNT ARGUMENTS
set -u
share=$1 mount=$2
shift 2
cd "$(dirname "$0")"
exec 9> lock
flock -n 9 || exit 0 # runs already

rm -f stop pid # of an earlier boot, whose process is now another one
# A reboot leaves no mount. Without one the run would begin anew, on a disk of the worker; this ends
# as "stopped", which is started again.
mountpoint -q "$mount" || sudo mount -t nfs "$share" "$mount" 9>&- || exit 1
short=0
while :; do
    [ ! -e stop ] || { code=75 && break; } # asked for while this mounted or waited
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
mv exit.part exit # whole or not there
