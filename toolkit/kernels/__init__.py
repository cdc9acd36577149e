"""Update rules over tensors. One contract: dense tensors and packed survivors go through the same function."""
