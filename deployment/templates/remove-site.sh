#!/bin/sh
# remove-site.sh NAME: from now on the SuperLink refuses every key that this site ever had.
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
. "$here/environment.sh"
exec bouquet deploy remove-site "$here" @LINK@ "${1:?the name of a site, as in keys/NAME.pub}"
