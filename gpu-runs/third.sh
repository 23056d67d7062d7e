cp -r .dev/mlm .dev/queue .dev/tune /tmp/tree/.dev/; cp .dev/pack/* /tmp/tree/.dev/pack/
for w in .dev/wt/*; do rm -rf /tmp/$(basename $w).new; cp -r $w /tmp/$(basename $w).new; [ -e /tmp/$(basename $w) ] || mv /tmp/$(basename $w).new /tmp/$(basename $w); done
cp .dev/fx2/p2 /tmp/p2; touch /tmp/p2.done
