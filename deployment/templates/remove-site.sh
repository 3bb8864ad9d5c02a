#!/bin/sh
# remove-site.sh NAME: from now on the SuperLink refuses this site's key.
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
. "$here/environment.sh"
name=${1:?the name of a site, as in keys/NAME.pub}
[ -e "$here/keys/$name.node" ] || { echo "there is no $here/keys/$name.node" >&2; exit 1; }
flwr supernode unregister "$(cat "$here/keys/$name.node")" @LINK@
rm -f "$here/keys/$name.pub" "$here/keys/$name.node"
echo "$name: removed"
