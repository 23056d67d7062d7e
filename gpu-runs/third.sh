cp .dev/fx2/* /tmp/; touch /tmp/p2.done
