"""What a saved context must agree with before a loaded model goes on from it."""

from griffin_offload.config import LoadConfig
from griffin_offload.pricing import Plan
from griffin_offload.runtime.prospect import Prospect
from griffin_offload.runtime.saved import Identity, Like
from griffin_offload.weights.checkpoint import fingerprint


def identity_of(prospect: Prospect, plan: Plan, config: LoadConfig) -> Identity:
    """What the numbers in a context depend on."""
    layers = prospect.shape_of(plan).layers
    return {
        "model": fingerprint(prospect.checkpoint),
        "precision": plan.precision,
        "dtype": str(prospect.dtype).removeprefix("torch."),
        "density": [kept / layer.neurons for kept, layer in zip(plan.kept, layers, strict=True)],
        "streamed": list(plan.streamed),
        "kv_bits": plan.kv_bits,
        "selection": config.selection,
        "batch_statistic": config.batch_statistic,
        "decay": config.decay,
    }


def like_of(prospect: Prospect, plan: Plan) -> Like:
    """What the parts of a saved context must look like."""
    shape = prospect.shape_of(plan)
    neurons = {index: (shape.layers[index].neurons, plan.kept[index]) for index in plan.streamed}
    widths = tuple(width for layer in shape.layers if (width := shape.kv_width_of(layer)))
    return Like(plan.context_tokens, shape.vocab_size, widths, prospect.dtype, neurons)
