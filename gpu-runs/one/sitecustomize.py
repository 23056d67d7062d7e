"""Ranks of one host share one GPU: NCCL takes each for a host of its own (NCCL_HOSTID), and talks over sockets."""
import os

if "LOCAL_RANK" in os.environ and os.environ.get("ONE_GPU"):
    os.environ["NCCL_HOSTID"] = "rank" + os.environ["RANK"]
    os.environ["LOCAL_RANK"] = "0"
