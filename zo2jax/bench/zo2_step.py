"""Times a step of the PyTorch ZO2 on random weights; a script for its own Python, which needs nothing of zo2jax.

Run with a checkout on the path: ``PYTHONPATH=FOLDER python -c "$(cat zo2_step.py)" SETTING``, a JSON object.
"""

import json
import resource
import statistics
import sys
import time
from contextlib import nullcontext
from typing import Any


def _model(torch: Any, setting: dict[str, Any]) -> Any:
    """An OPT of the setting's shape, its blocks in host memory, under ZO2."""
    from transformers import OPTConfig, modeling_utils
    from zo2 import ZOConfig
    from zo2.model.huggingface.opt.mezo_sgd import zo2 as offloaded

    # Initializing on the CPU takes minutes; random weights are drawn below.
    uninitialized = getattr(modeling_utils, "no_init_weights", nullcontext)
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, setting["dtype"]))
    with uninitialized():
        model = offloaded.OPTForCausalLM(OPTConfig(**setting["config"]))
    torch.set_default_dtype(dtype)
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            parameter.data.fill_(1.0 if name.endswith("norm.weight") else 0.0)
        else:
            drawn = torch.randn(parameter.shape, device="cuda", dtype=parameter.dtype)
            parameter.data.copy_(drawn.mul_(0.02))
    options = {"lr": 1e-6, "eps": 1e-3, "weight_decay": 0.0}
    model.zo_init(ZOConfig(method="mezo-sgd", zo2=True, offloading_device="cpu", working_device="cuda", **options))
    return model


def _main(setting: dict[str, Any]) -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("PyTorch sees no GPU, which ZO2 needs")
    start = time.perf_counter()
    model = _model(torch, setting)
    ids = torch.randint(0, setting["config"]["vocab_size"], (setting["rows"], setting["tokens"]), device="cuda")
    torch.cuda.synchronize()
    load = time.perf_counter() - start
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()

    def step() -> float:
        start = time.perf_counter()
        model.zo_train()
        float(model(input_ids=ids, labels=ids))
        return time.perf_counter() - start

    first = step()
    for _ in range(setting["warm_ups"]):
        step()
    times = [step() * 1e3 for _ in range(setting["steps"])]
    return {
        "ms": statistics.median(times),
        "times_ms": times,
        "load_s": load,
        "first_step_s": first,
        "peak_device_gib": torch.cuda.max_memory_allocated() / 2**30,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
        "peak_host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "versions": {"torch": torch.__version__},
    }


if __name__ == "__main__":
    print(json.dumps(_main(json.loads(sys.argv[1]))))
