"""What differs between engines: how a step is made, and where a whole weight or moment is found.

One contract, `ddp.Engine`, and its kinds: `ddp` (one rank, or DDP), `fused` (DDP with the update inside backward),
`fsdp2` and `zero` (DeepSpeed's ZeRO-1, 2 and 3). Whatever the engine, a checkpoint is made of parameter-shaped tensors
by name: each rank gives the parts that it holds.
"""
