#!/bin/sh
# Hands renewed certificates to the server, whose --tls-dir is /etc/mdm-tunnel/tls.
#   cp certbot-hook.sh /etc/letsencrypt/renewal-hooks/deploy/mdm-tunnel
#   chmod +x /etc/letsencrypt/renewal-hooks/deploy/mdm-tunnel
# certbot calls it after each renewal. The first time, do it by hand:
#   RENEWED_LINEAGE=/etc/letsencrypt/live/NAME RENEWED_DOMAINS="NAME *.NAME" mdm-tunnel
set -eu
folder=/etc/mdm-tunnel/tls
group=mdm-tunnel # the server's, so that it can read the key

set -f # a * in a name is no pattern
for name in $RENEWED_DOMAINS; do
    case $name in
    '*.'*) name=_wildcard.${name#'*.'} ;; # as --tls-dir wants it
    esac
    # Each appears whole. Until both are new the server stays with the old pair.
    install -m 640 -g "$group" "$RENEWED_LINEAGE/privkey.pem" "$folder/.new"
    mv "$folder/.new" "$folder/$name.key"
    install -m 640 -g "$group" "$RENEWED_LINEAGE/fullchain.pem" "$folder/.new"
    mv "$folder/.new" "$folder/$name.crt"
done
# It looks at its files by itself; this only says it at once.
systemctl reload mdm-tunnel-server 2>/dev/null || true
