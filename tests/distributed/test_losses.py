"""Each loss and mask on spread-out batches: values and gradients against one process, in fp64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sentence_transformers.losses import DistillKLDivLoss, MatryoshkaLoss, MultipleNegativesRankingLoss
from support.worlds import run_world
from torch import Tensor

QUERIES, SLOTS, WIDTH, T = 8, 3, 12, 0.1

#: what is computed → the recipe's loss section
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "own slots only": {"in_batch_negatives": False},
    "own rank only": {"cross_rank_negatives": False},
    "symmetric": {"symmetric": True},
    "gte": {"symmetric": True, "query_query_negatives": True, "passage_passage_negatives": True},
    "query_query": {"query_query_negatives": True},
    "passage_passage": {"passage_passage_negatives": True},
    "margin": {"false_negative_margin": 0.05},
    "margin symmetric": {"false_negative_margin": -0.1, "symmetric": True},
    "own slots margin": {"in_batch_negatives": False, "false_negative_margin": -0.1},
    "matryoshka": {"matryoshka_dims": [4, 8]},
    "matryoshka with the whole width": {"matryoshka_dims": [12, 4]},
    "scores": {"score_distillation_weight": 0.7},
    "scores matryoshka": {"score_distillation_weight": 0.7, "matryoshka_dims": [4, 8]},
    "vectors matryoshka": {"embedding_distillation_weight": 0.3, "matryoshka_dims": [4, 8]},
    "vectors": {"embedding_distillation_weight": 0.3},
    "everything": {
        "symmetric": True,
        "query_query_negatives": True,
        "passage_passage_negatives": True,
        "false_negative_margin": 0.3,
        "matryoshka_dims": [5, 12],
        "score_distillation_weight": 0.5,
        "embedding_distillation_weight": 2.0,
    },
}


def batch(kind: str) -> dict[str, Any]:
    """Vectors and texts of a global batch. ``kind``: distinct texts, or duplicates and siblings on different ranks."""
    generator = torch.Generator().manual_seed(5)
    valid = torch.tensor([[slot <= i % SLOTS for slot in range(SLOTS)] for i in range(QUERIES)])
    queries = [f"q{i}" for i in range(QUERIES)]
    passages = [[f"p{i}.{k}" for k in range(int(valid[i].sum()))] for i in range(QUERIES)]
    known = [[group[0]] for group in passages]
    if kind == "duplicates":
        queries[7] = queries[0]  # the same question twice, with other answers
        passages[5][0] = passages[1][0]  # siblings: one document answers two queries
        known[5] = [passages[1][0]]
        passages[2][1] = passages[6][0]  # a hard negative that is somebody's positive
        known[3] = [passages[3][0], passages[4][0]]  # one more known positive, which is another's
        passages[5][2] = passages[5][0]  # the positive drawn as its own negative
        known[7] = [passages[7][0], passages[7][1]]  # a known positive among the query's own negatives
        passages[4][1] = f" {passages[4][0]}\n"  # the positive again, in other white space
    return {
        "valid": valid,
        "queries": queries,
        "passages": passages,
        "known": known,
        "query_vectors": F.normalize(torch.randn(QUERIES, WIDTH, generator=generator, dtype=torch.float64), dim=1),
        "slot_vectors": F.normalize(
            torch.randn(QUERIES, SLOTS, WIDTH, generator=generator, dtype=torch.float64), dim=2
        ),
        "teacher_scores": torch.randn(QUERIES, SLOTS, generator=generator, dtype=torch.float64),
        "teacher_queries": torch.randn(QUERIES, WIDTH, generator=generator, dtype=torch.float64),
        "teacher_slots": torch.randn(QUERIES, SLOTS, WIDTH, generator=generator, dtype=torch.float64),
    }


def by_hand(data: dict[str, Any], config: dict[str, Any], q: Tensor, p: Tensor, t: Tensor, world: int) -> Tensor:
    """The definitions as loops over queries and candidates."""
    total = q.new_zeros(())
    widths = {WIDTH, *config.get("matryoshka_dims", [])}
    for dim in widths:
        total = total + info_nce(data, config, cut(q, dim), cut(p, dim), t, world)
        for i in range(QUERIES if "score_distillation_weight" in config else 0):
            filled = data["valid"][i]
            student = (cut(p, dim)[i][filled] @ cut(q, dim)[i] / t).log_softmax(0)
            teacher = data["teacher_scores"][i][filled].softmax(0)
            kl = (teacher * (teacher.log() - student)).sum()
            total = total + config["score_distillation_weight"] * kl / QUERIES
    total = total / len(widths)
    if "embedding_distillation_weight" in config:
        ours = torch.cat((q, p[data["valid"]]))
        theirs = torch.cat((data["teacher_queries"], data["teacher_slots"][data["valid"]]))
        total = total + config["embedding_distillation_weight"] * (1 - F.cosine_similarity(ours, theirs)).mean()
    return total


def cut(x: Tensor, dim: int) -> Tensor:
    return x if dim == WIDTH else F.normalize(x[..., :dim], dim=-1)


def info_nce(data: dict[str, Any], config: dict[str, Any], q: Tensor, p: Tensor, t: Tensor, world: int) -> Tensor:
    valid, queries = data["valid"], [text.strip() for text in data["queries"]]
    passages, known = ([[text.strip() for text in group] for group in data[key]] for key in ("passages", "known"))
    margin = config.get("false_negative_margin", math.inf)
    share = QUERIES // world
    losses = []
    for i in range(QUERIES):
        positive = q[i] @ p[i, 0]
        answers = {passages[i][0], *known[i]}

        def reach(i: int) -> list[int]:
            if not config.get("in_batch_negatives", True):
                return [i]
            whole = config.get("cross_rank_negatives", True)
            return [j for j in range(QUERIES) if whole or j // share == i // share]

        slots = [(j, k) for j in reach(i) for k in range(SLOTS) if valid[j, k]]

        def no_negative(j: int, k: int, i: int = i, answers: set[str] = answers) -> bool:
            return passages[j][k] in answers or (k == 0 and queries[j] == queries[i])

        def twin(j: int, i: int = i, answers: set[str] = answers) -> bool:
            return queries[j] == queries[i] or passages[j][0] in answers or passages[i][0] in known[j]

        q_p = [q[i] @ p[j, k] for j, k in slots if (j, k) != (i, 0) and not no_negative(j, k)]
        p_q = [p[i, 0] @ q[j] for j in reach(i) if j != i and not twin(j)]
        q_q = [q[i] @ q[j] for j in reach(i) if j != i and not twin(j)]
        p_p = [p[i, 0] @ p[j, k] for j, k in slots if j != i and not no_negative(j, k)]
        kept = [[s for s in group if not s > positive + margin] for group in (q_p, p_q, q_q, p_p)]
        groups = [torch.stack([positive, *kept[0]])]
        if config.get("symmetric"):
            groups.append(torch.stack([positive, *kept[1]]))
        same_type = [*(kept[2] if config.get("query_query_negatives") else [])]
        same_type += kept[3] if config.get("passage_passage_negatives") else []
        if config.get("query_query_negatives") or config.get("passage_passage_negatives"):
            log_z = (torch.cat([*groups, torch.stack(same_type)]) / t).logsumexp(0)
        else:
            log_z = torch.stack([(group / t).logsumexp(0) for group in groups]).mean()
        losses.append(log_z - positive / t)
    return torch.stack(losses).mean()


def compute(kinds: list[str], chunked: bool) -> dict[tuple[str, str], tuple[Tensor, ...]]:
    """Every case on this rank's part: loss share, gradients of queries, slots and log temperature."""
    import torch.distributed as dist

    from megatron_embed.recipes.config.schema import LossSection
    from megatron_embed.recipes.training import loss as loss_module
    from megatron_embed.recipes.training.loss import ContrastiveLoss
    from megatron_embed.recipes.training.targets import Targets, identify

    loss_module.CHUNK_BYTES = 3000 if chunked else 64 << 20
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = slice(rank * QUERIES // world, (rank + 1) * QUERIES // world)
    results = {}
    for kind in kinds:
        data = batch(kind)
        valid = data["valid"][mine]
        ids = identify(data["queries"][mine], data["passages"][mine], data["known"][mine], SLOTS)
        has = torch.ones(valid.shape[0] + int(valid.sum()), dtype=torch.bool)
        teachers = torch.cat((data["teacher_queries"][mine], data["teacher_slots"][mine][valid]))
        targets = Targets(valid.shape[0], valid, **ids, teacher_scores=data["teacher_scores"][mine])
        targets = targets.widened(max(map(len, data["known"])))  # the ranks' queries have 1 and 2 known positives
        targets = Targets(**{**vars(targets), "teacher_embeddings": teachers, "has_teacher_embedding": has})
        for name, config in CASES.items():
            q, p = (data[key][mine].clone().requires_grad_() for key in ("query_vectors", "slot_vectors"))
            log_t = torch.tensor(math.log(T), dtype=torch.float64, requires_grad=True)
            function = ContrastiveLoss(LossSection(temperature=T, **config), group=dist.group.WORLD)
            value = function(torch.cat((q, p[valid])), targets, log_t.exp())
            value.backward()
            results[kind, name] = (value.detach(), q.grad, p.grad, log_t.grad)
    return results


@pytest.mark.parametrize(("world", "chunked"), [(1, False), (1, True), (2, True), (4, False)])
def test_losses_equal_the_definitions(world: int, chunked: bool) -> None:
    results = run_world(compute, world, ["distinct", "duplicates"], chunked)
    for kind in ("distinct", "duplicates"):
        data = batch(kind)
        for name, config in CASES.items():
            q, p = (data[key].clone().requires_grad_() for key in ("query_vectors", "slot_vectors"))
            log_t = torch.tensor(math.log(T), dtype=torch.float64, requires_grad=True)
            wanted = by_hand(data, config, q, p, log_t.exp(), world)
            wanted.backward()
            value, q_grad, p_grad, t_grad = zip(*(result[kind, name] for result in results), strict=True)
            message = f"{kind}, {name}: {{}}".format
            tight = {"rtol": 1e-10, "atol": 1e-12}
            torch.testing.assert_close(sum(value), wanted.detach(), msg=message, **tight)
            torch.testing.assert_close(torch.cat(q_grad), q.grad, msg=message, **tight)
            torch.testing.assert_close(torch.cat(p_grad), p.grad, msg=message, **tight)
            torch.testing.assert_close(sum(t_grad), log_t.grad, msg=message, **tight)


class GivenVectors(torch.nn.Module):
    """What MatryoshkaLoss wants of a model."""

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict(features)

    def get_embedding_dimension(self) -> int:
        return WIDTH


def sentence_transformers_loss(name: str, q: Tensor, slots: list[Tensor], scores: Tensor) -> Tensor:
    """The same by sentence-transformers' own code."""
    model: Any = torch.nn.Identity()
    directions = ("query_to_doc", "doc_to_query")
    if name == "symmetric":
        loss = MultipleNegativesRankingLoss(model, 1 / T, directions=directions, partition_mode="per_direction")
        return loss.compute_loss_from_embeddings([q, *slots], None)
    if name == "gte":
        every = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
        loss = MultipleNegativesRankingLoss(model, 1 / T, directions=every, partition_mode="joint")
        return loss.compute_loss_from_embeddings([q, *slots], None)
    plain = MultipleNegativesRankingLoss(model, 1 / T)
    if name == "matryoshka":
        dims = [WIDTH, *CASES[name]["matryoshka_dims"]]
        shares = [1 / len(dims)] * len(dims)
        given = GivenVectors()
        truncated = MatryoshkaLoss(given, MultipleNegativesRankingLoss(given, 1 / T), dims, shares)
        return truncated([{"sentence_embedding": x} for x in (q, *slots)], torch.empty(0))
    distill = DistillKLDivLoss(model, student_temperature=T, teacher_temperature=1.0)
    # theirs is multiplied by the square of the student's temperature
    kl = distill.compute_loss_from_embeddings([q, *slots], scores) / T**2
    return plain.compute_loss_from_embeddings([q, *slots], None) + CASES[name]["score_distillation_weight"] * kl


@pytest.mark.parametrize("name", ["symmetric", "gte", "matryoshka", "scores"])
def test_losses_equal_sentence_transformers(name: str) -> None:
    from megatron_embed.recipes.config.schema import LossSection
    from megatron_embed.recipes.training.loss import ContrastiveLoss
    from megatron_embed.recipes.training.targets import Targets

    data = batch("distinct")
    leaves = [data[key].clone().requires_grad_() for key in ("query_vectors", "slot_vectors")]
    q, p = (F.normalize(leaf, dim=-1) for leaf in leaves)  # theirs normalises whatever it is given
    valid = torch.ones(QUERIES, SLOTS, dtype=torch.bool)
    targets = Targets(QUERIES, valid, teacher_scores=data["teacher_scores"])
    loss = ContrastiveLoss(LossSection(temperature=T, **CASES[name]))
    found = loss(torch.cat((q, p.flatten(0, 1))), targets)
    wanted = sentence_transformers_loss(name, q, list(p.unbind(1)), data["teacher_scores"])
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    found_grads = torch.autograd.grad(found, leaves, retain_graph=True)
    torch.testing.assert_close(found_grads, torch.autograd.grad(wanted, leaves), rtol=1e-9, atol=1e-12)
