#!/bin/sh
# Tells the running SuperLink which keys may join: first it revokes those that count no longer, then
# it registers each keys/NAME.pub that is new. keys/NAME.node keeps the number that Flower gives it.
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
. "$here/environment.sh"
exec bouquet deploy register-sites "$here" @LINK@
