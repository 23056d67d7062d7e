"""DPO's losses and gradients equal a float64 reference by hand, at one tensor-parallel size.

torchrun --standalone --nproc-per-node TP -m tests.examples.check_dpo
"""

from typing import Any

import torch
import torch.nn.functional as F
from dpo_gpt import dpo_loss, log_ratios
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from megatron_tiling import TilingConfig, tile
from tests.resident.check_lm_head import OPTIONS, RANK, TP, batch, build
from tests.support.harness import megatron, relative_error

BETA = 0.7


def by_hand(policy: Any, reference: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Each pair's loss, in float64 from whole logits."""

    def of_answers(model: Any) -> Tensor:
        def logits_of(*, hidden_states: Tensor, output_layer: Any, output_weight: Any, **unused: Any) -> Tensor:
            return gather_from_tensor_model_parallel_region(output_layer(hidden_states, weight=output_weight)[0])

        logits = model(
            *(inputs[key] for key in ("tokens", "position_ids", "attention_mask")), output_processor=logits_of
        )
        log_p = logits.transpose(0, 1).double().log_softmax(-1)
        return (log_p.gather(-1, inputs["labels"][..., None]).squeeze(-1) * inputs["loss_mask"]).sum(1)

    chosen, rejected = (of_answers(policy) - of_answers(reference)).unbind()
    return -F.logsigmoid(BETA * (chosen - rejected))


def main() -> None:
    with megatron(tensor_model_parallel_size=TP):
        for sequence_parallel, tied in ((False, True), (True, False)):
            case = {name: values[0] for name, values in OPTIONS.items()}
            case |= {"sequence_parallel": sequence_parallel, "tied": tied}
            policy, reference = build(case), build(case).requires_grad_(False)
            for index, parameter in enumerate(policy.parameters()):  # else both are the same model
                with torch.no_grad():
                    parameter += 0.05 * torch.sin(torch.arange(parameter.numel()) + index).view_as(parameter)
            inputs = batch()
            inputs["tokens"], inputs["labels"] = inputs.pop("input_ids"), inputs["labels"].clamp(0, 87)

            exact = by_hand(policy, reference, inputs)
            exact.backward()
            expected = {name: parameter.grad for name, parameter in policy.named_parameters()}
            policy.zero_grad(set_to_none=True)
            tile(policy, TilingConfig(factor=2))
            total, pairs, logged = dpo_loss(BETA, log_ratios(policy, reference, inputs))
            total.backward()
            assert int(pairs) == 1 and abs(float(total - exact)) < 1e-5, (float(total), float(exact))
            assert torch.equal(logged["dpo loss"], torch.stack([total.detach(), torch.ones(())]))
            for name, parameter in policy.named_parameters():
                error = relative_error(parameter.grad, expected[name])
                assert error < 1e-4, f"{name}: error {error:.2e}"
    if RANK == 0:
        print(f"DPO by hand at TP={TP}: equal")


if __name__ == "__main__":
    main()
