# shellcheck shell=sh
# Goes to /etc/profile.d/: a shell by SSH works with the container's own variables, which it does not inherit.
if [ -r /run/hybrid_vit_cascade.env ]; then
    # shellcheck source=/dev/null
    . /run/hybrid_vit_cascade.env
fi
