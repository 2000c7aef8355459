"""The job: plan, fuse, choose steps for a target, compress block by block, resume, drop blocks, sweep sizes."""
