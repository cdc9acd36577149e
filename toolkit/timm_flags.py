"""Flags of timm's train.py that ours takes without a change, or does not offer; docs/timm.md shows the second.

By the names that they have in timm's args.yaml, so that one is read. Standard library only.
"""

_SHARDS = "data comes as WebDataset shards with an index; python -m shards.image_folder makes them of a folder"
_KD = "a teacher's scores are learned, as timm's logit and kl do; --kd-model-name names one"
_NAFLEX = "images of a batch have one size; --input-size sets it"
_SIZES = "all steps have one image size; --img-size sets it"
_SPLITS = "a batch is augmented once; --aug-repeats has several copies of an image in it"
_WANDB = "--report-to wandb does it; its own WANDB_PROJECT and WANDB_TAGS set the rest"

# Taken, and said to change nothing: whether a value follows, and why.
IDLE: dict[str, tuple[bool, str]] = {
    "device": (True, "accelerate's launch file chooses the device"),
    "drop_connect": (True, "timm ignores it as well; --drop-path is its later name"),
    "no_prefetcher": (False, "timm's prefetcher is not in use, batches are normalised on the device either way"),
    "synchronize_step": (False, "a step waits for the device only where a number is read"),
    "use_multi_epochs_loader": (False, "workers live on from epoch to epoch either way"),
    "worker_seeding": (True, "chances come from seed, epoch and image, not from a worker"),
}

# Not offered: the value with which timm does nothing of the kind either, and the reason with a remedy.
NOT_OFFERED: dict[str, tuple[object, str]] = {
    "aug_splits": (0, _SPLITS),
    "class_map": ("", "labels are in the shards; name the classes when they are made"),
    "dataset": ("", _SHARDS),
    "dataset_download": (False, _SHARDS),
    "dataset_trust_remote_code": (False, _SHARDS),
    "device_modules": (None, "import them in a script of your own that calls toolkit.train.main()"),
    "epoch_repeats": (0.0, "an epoch has each image once; raise --epochs"),
    "fuser": ("", "it is TorchScript's; use --torchcompile"),
    "input_img_mode": (None, "images are read as RGB; --in-chans 1 makes them grey"),
    "input_key": (None, _SHARDS),
    "jsd_loss": (False, _SPLITS),
    "kd_distill_type": ("logit", _KD),
    "kd_loss_type": ("kl", _KD),
    "kd_student_feature_dim": (None, _KD),
    "kd_teacher_feature_dim": (None, _KD),
    "kd_token_distill_type": ("soft", _KD),
    "log_wandb": (False, _WANDB),
    "model_ema_force_cpu": (False, "the average is evaluated where the model is; leave it out"),
    "naflex_loader": (False, _NAFLEX),
    "naflex_loss_scale": ("linear", _NAFLEX),
    "naflex_max_seq_len": (576, _NAFLEX),
    "naflex_patch_size_probs": (None, _NAFLEX),
    "naflex_patch_sizes": (None, _NAFLEX),
    "naflex_patchify_channels_first": (False, _NAFLEX),
    "naflex_train_seq_lens": ([128, 256, 576, 784, 1024], _NAFLEX),
    "no_ddp_bb": (False, "ranks share BatchNorm's statistics as --dist-bn says, and DDP their buffers"),
    "no_resume_opt": (False, "--resume takes all or nothing; --initial-checkpoint takes the weights alone"),
    "pretrained_path": (None, "--initial-checkpoint FILE does it, with a new classifier where classes differ"),
    "recovery_interval": (0, "--checkpoint-interval does it, in optimizer steps"),
    "resplit": (False, _SPLITS),
    "save_images": (False, "python -m shards.verify reads the images again; nothing writes them out"),
    "split_bn": (False, _SPLITS),
    "start_epoch": (None, "--resume auto goes on where the checkpoint stands, within an epoch too"),
    "target_key": (None, _SHARDS),
    "torchscript": (False, "training in TorchScript is not tried here; use --torchcompile"),
    "train_batch_sizes": (None, _SIZES),
    "train_batches_per_epoch": (None, "an epoch is as long as the data; change --epochs"),
    "train_img_sizes": (None, _SIZES),
    "train_num_samples": (None, "the shards' index knows how many images there are"),
    "train_size_probs": (None, _SIZES),
    "train_size_random_mix": (0.1, _SIZES),
    "train_size_schedule": ("constant", _SIZES),
    "train_size_schedule_spread": (0.65, _SIZES),
    "train_steps_per_epoch": (None, "an epoch is as long as the data; change --epochs"),
    "tta": (0, "each image is evaluated once, as its centre crop"),
    "val_num_samples": (None, "the shards' index knows how many images there are"),
    "variable_batch_loss_scale": ("none", _SIZES),
    "wandb_project": (None, _WANDB),
    "wandb_resume_id": ("", _WANDB),
    "wandb_tags": ([], _WANDB),
}
