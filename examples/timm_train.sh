#!/bin/sh
# timm's own train.py, unmodified, with AdamWPrune. Its repository has that file; timm's package on PyPI has not.
# Run: sh examples/timm_train.sh pytorch-image-models/train.py --data-dir /data/imagenet --model resnet50 --epochs 100
# `--device-modules` imports toolkit.optim, which puts its names into timm's factory. Steps are optimizer steps.
# timm's groups have no marks, so every matrix is pruned: class tokens and position embeddings are not, relative position
# tables are. The log says once what it will be.
exec python "$@" \
  --device-modules toolkit.optim \
  --opt adamwprune --weight-decay 0.05 \
  --opt-kwargs sparsity=0.7 begin_step=${BEGIN_STEP:-500} end_step=${END_STEP:-6000} frequency=${FREQUENCY:-50}
