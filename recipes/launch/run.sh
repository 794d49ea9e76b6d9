#!/usr/bin/env bash
# On every worker: `nfnets-xla ARGUMENTS`, again for as long as it says that it was interrupted and
# has saved (exit code 75), or was before it had begun (143), unless the file `stop` is there. While
# it lives it holds the lock; `pid` is the process to ask to stop; `exit` is what it ended with.
#   bash run.sh HOST:/FOLDER MOUNT ARGUMENTS
set -u
share=$1 mount=$2
shift 2
cd "$(dirname "$0")"
exec 9> lock
flock -n 9 || exit 0 # runs already

rm -f stop
# A reboot leaves no mount. Without one the run would begin anew, on a disk of the worker; this ends
# as "stopped", which is started again.
mountpoint -q "$mount" || sudo mount -t nfs "$share" "$mount" 9>&- || exit 1
code=75
while [[ "$code" =~ ^(75|143)$ ]] && [ ! -e stop ]; do
    echo "$(date -u +%FT%TZ) nfnets-xla $*"
    venv/bin/nfnets-xla "$@" &
    echo $! > pid
    wait $!
    code=$?
done
rm -f pid
echo "$(date -u +%FT%TZ) ended with $code"
echo "$code" > exit
