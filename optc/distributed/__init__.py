"""The program of each rank of a pipeline: ``torchrun --nproc-per-node STAGES -m optc.distributed ARTIFACT``."""
