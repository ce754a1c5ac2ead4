"""The parts of the pipeline: a specialist, distillation, the mixed stage, and the figures of a model.

Each does what its folder does not hold yet, so that a part that was stopped goes on where it was.
"""

import gc
import logging
import shutil
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from shlex import quote
from typing import Any, Protocol

import torch

from tokensieve.config import UserError
from tokensieve.model import DecoderForCausalLM, check_tokenizer, load, load_tokenizer
from tokensieve.model.files import model_path
from tokensieve.model.positions import check_positions
from tokensieve.posttrain import distillation, mixture, stages
from tokensieve.posttrain.difficulty import find_difficulty
from tokensieve.posttrain.groups import Group, groups_of
from tokensieve.posttrain.judging import check_judge, judging
from tokensieve.posttrain.language import LanguageShare
from tokensieve.posttrain.outcomes import demonstrations_of, respond_of
from tokensieve.posttrain.sampled import Sampled, figures, gain, pass_rate, room, sample
from tokensieve.posttrain_config import GrpoConfig, PosttrainConfig
from tokensieve.tasks import encoder
from tokensieve.tasks.documents import Split
from tokensieve.tasks.problems import DOMAINS, Domain, Problem
from tokensieve.train.lora import targets_of

log = logging.getLogger("tokensieve")

# Each purpose draws problems of its own: offsets from the config's seed.
COLD, KNOB, GRPO, DISTILL, MIXED, FILLED, ON_POLICY_PROMPTS = range(7)
PURPOSES = 10  # so that the next seed of a config has none of these

SPLITS: tuple[Split, ...] = ("train", "test")
BASE, DISTILLED, ON_POLICY, FINAL = "base", "distilled", "on-policy", "final"  # the models, beside "specialist-DOMAIN"
STARTS = {ON_POLICY: (DISTILLED,), FINAL: (DISTILLED, ON_POLICY)}  # of this run; another name is a checkpoint's
START_KEYS = {ON_POLICY: "distill.on_policy.model", FINAL: "rl.model"}

SAME = "with the same --config, --model and --set"  # that the commands of one folder need


def specialist_of(domain: str) -> str:
    """The name of a specialist: of its part in metrics.json, and of its model in the figures."""
    return f"specialist-{domain}"


def release_memory() -> None:
    """Gives back what models and engines before this one held.

    An engine that has recorded its steps refers to itself, and would keep its pages on the GPU, which other processes
    may share.
    """
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


class Watch(Protocol):
    """What a part calls while it works."""

    def on_progress(self, what: str, done: int, total: int) -> None:
        """So much of what is done has been done."""

    def note(self) -> None:
        """The figures have changed."""


class Parts:
    """The parts of one run, in its folder `config.out`.

    config: with the device chosen. domains: by their names, which the methods take. found: metrics.json's figures,
    which the parts add to. UserError for a tokenizer without a chat format.
    """

    def __init__(self, config: PosttrainConfig, domains: Mapping[str, Domain], found: dict[str, Any], watch: Watch):
        self.config, self.domains, self.found, self.watch = config, domains, found, watch
        self.out = Path(config.out)
        self.tokenizer = load_tokenizer(config.model)
        self.encode = encoder(self.tokenizer)
        self.encode.chat()

    def load(self, source: str | Path) -> DecoderForCausalLM:
        """The model in float32, on the device.

        UserError for one that cannot be trained as the config says, and for prompts in which nothing would be selected.
        """
        release_memory()
        config, model = self.config, load(source, torch.float32, device=self.config.device)
        check_tokenizer(self.tokenizer, model.config)
        if config.selection == "indexer" and not model.is_sparse:
            raise UserError(f"{source} is dense and has no indexers; sparsify it first, or add --dense")
        if model.is_sparse and config.tokens <= model.top_k:
            raise UserError(
                f"tokens is {config.tokens}, and {source} selects {model.top_k} keys: nothing would be selected; "
                "make the prompts several times longer"
            )
        longest = config.tokens + config.new_tokens
        what = f"tokens and new_tokens, {longest} together, are"
        check_positions(model.config.max_position_embeddings, longest, what, f"give {source} fewer")
        return model

    def groups(self, domains: Sequence[str]) -> list[Group]:
        """At the difficulties that their specialists measured; at the usual ones without specialists."""
        known = dict(self.config.difficulty.fixed)
        for name in domains:
            measured = self.found.get(specialist_of(name), {}).get("difficulty", {})
            known |= {group: knob["difficulty"] for group, knob in measured.items()}
        return groups_of(self.config, [self.domains[name] for name in domains], self.encode, known)

    def folder(self, model: str) -> Path:
        """The folder of the stage that leaves a model."""
        if model in (FINAL, ON_POLICY):
            return self.out / model
        return self.out / "distilled/train" if model == DISTILLED else self._specialist_folder(model) / "rl"

    def _specialist_folder(self, model: str) -> Path:
        return self.out / "specialists" / model.removeprefix(specialist_of(""))

    def history(self, model: str) -> stages.History:
        """The rows of the stage that leaves a model, if it is done; else none."""
        return stages.history(self.folder(model)) or []

    def is_done(self, model: str) -> bool:
        return stages.history(self.folder(model)) is not None

    def path(self, model: str) -> str | Path:
        """What `load` takes. UserError for a model that is not there yet."""
        if model == BASE:
            return self.config.model
        if not self.is_done(model):
            commands = {DISTILLED: "distill", ON_POLICY: "distill", FINAL: "rl"}
            domain = model.removeprefix(specialist_of(""))
            named = domain if domain in DOMAINS else f"FILE_OR_OBJECT (of {domain})"
            command = commands.get(model, f"specialist --domain {named}")
            other = "" if model in commands else f", or leave {domain} out of domains"
            raise UserError(
                f"{self.out}: there is no {model} model yet; run first: tokensieve {command} "
                f"--out {quote(str(self.out))} {SAME}{other}"
            )
        return self.folder(model) / stages.MODEL

    def check_start(self, model: str, domains: Sequence[str]) -> None:
        """UserError if what a model is made from is not there yet."""
        if model == DISTILLED:
            for name in domains:
                if not self._answers_file(name).is_file():
                    self.path(specialist_of(name))
        elif model == ON_POLICY:
            for name in domains:
                self.path(specialist_of(name))
            self.start(model)
        elif model == FINAL:
            self.start(model)

    def start(self, model: str) -> str | Path:
        """What the on-policy or the final model starts from, as `load` takes it. UserError if it is not there yet."""
        named = self._start_named(model)
        if not named:
            return self.path(DISTILLED if model == FINAL else BASE)
        return self.path(named) if named in STARTS[model] else named

    def _start_named(self, model: str) -> str:
        """As the config names it; empty if it does not."""
        on_policy = self.config.distill.on_policy
        if model == FINAL:
            return self.config.rl.model
        return "" if on_policy is None else on_policy.model

    def check(self, domains: Sequence[str], rewarded: bool) -> None:
        """UserError now for what would stop a part only after hours.

        Problems that cannot be drawn or graded: no language, too few rows, no sandbox, no math-verify. Options that TRL
        does not take, adapters of layers that are not there, and models to start from that are not. If answers are to
        be `rewarded`: no py3langid, or a judge that does not answer, or not as `judge.agreement` wants it.
        """
        stages.check_options(self.config)
        distill, rl = self.config.distill, self.config.rl
        for started, own in STARTS.items():
            named = self._start_named(started)
            if named and named not in own:
                try:
                    model_path(named)
                except UserError as error:
                    raise UserError(f"{START_KEYS[started]}: {error}; or {' or '.join(own)}, of this run") from error
        tuned = (self.config.cold, self.config.specialist, distill.train, distill.on_policy, rl.train)
        adapters = [stage.lora for stage in tuned if stage is not None and stage.lora is not None]
        trunk = self.load(self.config.model).model  # before prompts that it cannot read are made
        for adapter in adapters:
            targets_of(trunk, adapter.targets)
        asked: list[tuple[Group, list[Problem]]] = []
        for group in self.groups(domains):
            count, seed = len(group.by_language), self._seed(COLD)
            asked.append((group, [e for split in SPLITS for e in group.examples(split, count, seed)]))
            for example in asked[-1][1]:
                group.task.score(example, example.shown)
        if rewarded:
            mixture.rewards(asked, self.encode, self.config)
            check_judge(self.config, asked, self.found, self.watch.note)

    def _on_step(self, what: str) -> stages.OnStep:
        def told(step: int, steps: int, row: dict[str, float]) -> None:
            shown = ", ".join(f"{name} {float(row[name]):.3g}" for name in ("loss", "reward", "kl") if name in row)
            log.info("%s: step %d of %d: %s", what, step, steps, shown)
            self.watch.on_progress(what, step, steps)

        return told

    def _seed(self, purpose: int) -> int:
        return self.config.seed * PURPOSES + purpose

    def _examples(self, groups: Sequence[Group], count: int, purpose: int) -> list[tuple[Group, list[Problem]]]:
        """`count` training problems of the groups together, in equal parts but for one."""
        counts = mixture.shares(count, {group.name: 1.0 for group in groups})
        return self._drawn(groups, counts, purpose)

    def _drawn(
        self, groups: Sequence[Group], counts: dict[str, int], purpose: int
    ) -> list[tuple[Group, list[Problem]]]:
        seed = self._seed(purpose)
        return [(g, g.examples("train", counts[g.name], seed)) for g in groups if counts[g.name]]

    def _sample(
        self, model: DecoderForCausalLM, what: str, asked: mixture.Asked, samples: int, **more: Any
    ) -> list[list[Sampled]]:
        def on_progress(_: str, done: int, total: int) -> None:
            self.watch.on_progress(what, done, total)

        config = self.config
        found = sample(
            model, self.tokenizer, self.encode, asked, samples, config.new_tokens,
            result_tokens=config.result_tokens, at_once=config.at_once,
            selector="indexer" if config.selection == "indexer" else "dense", on_progress=on_progress, **more,
        )  # fmt: skip
        release_memory()  # of its engine, as what follows may go on with the model
        return found

    def specialist(self, domain: str) -> None:
        """Cold start on demonstrations, the difficulty of each mode, and GRPO."""
        name = specialist_of(domain)
        own, cold = self.found.setdefault(name, {}), self._specialist_folder(name) / "cold"
        if stages.history(cold) is None:
            model = self.load(self.config.model)
            self._cold_start(model, self.groups([domain]), cold, own)
        else:
            model = self.load(cold / stages.MODEL)
        knobs = own.setdefault("difficulty", {})
        self._specialist_folder(name).mkdir(parents=True, exist_ok=True)  # without it the figures would be forgotten
        for group in self.groups([domain]):
            if group.name not in knobs:
                knobs[group.name] = self._difficulty(model, group)
                self.watch.note()
        asked = self._examples(self.groups([domain]), _prompts(self.config.specialist), GRPO)
        self._reinforce(model, asked, self.config.specialist, self.folder(name), domain)
        self.tidy(name)

    def tidy(self, model: str) -> None:
        """Removes what only the making of a model needed, and a kill may have left."""
        folders, cold = [self.folder(model)], self._specialist_folder(model) / "cold"
        if model not in (DISTILLED, ON_POLICY, FINAL):
            folders.append(cold)
            shutil.rmtree(cold / stages.MODEL, ignore_errors=True)
        for path in (path for folder in folders for path in folder.glob("checkpoint-*")):
            shutil.rmtree(path)

    def _cold_start(
        self, model: DecoderForCausalLM, groups: Sequence[Group], folder: Path, own: dict[str, Any]
    ) -> None:
        """Nothing but a warning if no problem has a right answer to show."""
        stage = self.config.cold_of(groups[0].domain)
        asked = self._examples(groups, stage.steps * stage.rows, COLD)
        shown = [example for _, examples in asked for example in examples if example.item.answer]
        own["demonstrations"] = len(shown)
        self.watch.note()
        if not shown:
            log.warning("%s has no right answers to show: no cold start, it begins with GRPO", groups[0].domain)
            return
        rows = demonstrations_of(shown, self.encode)
        stages.fine_tune(
            model,
            self.tokenizer,
            rows,
            stage,
            self.config,
            folder,
            self._on_step(f"{groups[0].domain}, cold start"),
        )

    def _difficulty(self, model: DecoderForCausalLM, group: Group) -> dict[str, Any]:
        config = self.config.difficulty
        if group.name in config.fixed:
            return {"difficulty": config.fixed[group.name], "rates": {}, "within": None}

        def rate_at(difficulty: int) -> float:
            at = group.at(difficulty)
            examples = at.examples("train", config.prompts, self._seed(KNOB))
            what = f"{group.name}, pass rate at difficulty {difficulty}"
            return pass_rate(self._sample(model, what, [(at, examples)], config.samples, seed=self._seed(KNOB)))

        return find_difficulty(rate_at, group.task.domain.difficulty, config)

    def _reinforce(
        self, model: DecoderForCausalLM, asked: mixture.Asked, stage: GrpoConfig, folder: Path, what: str
    ) -> None:
        config = self.config
        with judging(config, asked) as judge:
            rewards = mixture.rewards(asked, self.encode, config, judge)
            prompts = mixture.prompts(asked, self.encode)
            on_step = self._on_step(f"{what}, GRPO")
            respond = respond_of([(group.task, examples) for group, examples in asked], self.encode)
            stages.reinforce(
                model, self.tokenizer, prompts, rewards, stage, config, folder, on_step, respond,
                room(asked, config.result_tokens),
            )  # fmt: skip

    def distill(self, domains: Sequence[str]) -> None:
        """Answers of all specialists, the best of them, and one model that is trained on these from the base."""
        config = self.config.distill
        lines = [line for name in domains for line in self._answers_of(name)]
        groups = self.groups(domains)
        rows, kept, counts = distillation.training_rows(groups, lines, config, self.encode, self._seed(FILLED))
        distillation.write_lines(self.out / "distilled/data.jsonl", kept)
        self.found[DISTILLED] = {"data": counts, "rows": len(rows)}
        self.watch.note()
        model, folder = self.load(self.config.model), self.folder(DISTILLED)
        distillation.check_tokens(kept, model.config.vocab_size)
        on_step = self._on_step("distillation")
        stages.fine_tune(model, self.tokenizer, rows, config.train, self.config, folder, on_step)

    def distill_on_policy(self, domains: Sequence[str]) -> None:
        """One model that answers by itself, and learns at each token what the domain's specialist would go on with."""
        config = self.config.distill.on_policy
        assert config is not None
        groups = self.groups(domains)
        asked = self._examples(groups, config.steps * config.prompts, ON_POLICY_PROMPTS)
        prompts = mixture.prompts(asked, self.encode)
        prompts = prompts.add_column("teacher", [group.domain for group, examples in asked for _ in examples])
        self.found[ON_POLICY] = {"prompts": {group.name: len(examples) for group, examples in asked}}
        self.watch.note()
        stages.distill_on_policy(
            self.load(self.start(ON_POLICY)),
            {name: self.load(self.path(specialist_of(name))) for name in dict.fromkeys(g.domain for g, _ in asked)},
            self.tokenizer, prompts, config, self.config, self.folder(ON_POLICY),
            self._on_step("on-policy distillation"),
            respond_of([(group.task, examples) for group, examples in asked], self.encode),
            room(asked, self.config.result_tokens),
        )  # fmt: skip

    def _answers_file(self, domain: str) -> Path:
        return self.out / "distilled/samples" / f"{domain}.jsonl"

    def _answers_of(self, domain: str) -> list[distillation.Line]:
        """A specialist's answers: those of its file, which may come from elsewhere, or sampled now."""
        file = self._answers_file(domain)
        if not file.is_file():
            config, name = self.config.distill, specialist_of(domain)
            model, seed = self.load(self.path(name)), self._seed(DISTILL)
            asked = [(group, group.examples("train", config.prompts, seed)) for group in self.groups([domain])]
            answers = self._sample(model, f"answers of {name}", asked, config.samples, seed=seed)
            distillation.write_lines(file, distillation.lines_of(answers, name))
        return distillation.read_lines(file)

    def rl(self, domains: Sequence[str]) -> None:
        """GRPO over all domains in one stage, from the distilled model unless the config names another."""
        config = self.config.rl
        model = self.load(self.start(FINAL))
        modes = len(self.config.modes)
        groups = self.groups(domains)
        ratios = {group.name: config.ratios.get(group.domain, 1.0) / modes for group in groups}
        counts = mixture.shares(_prompts(config.train), ratios)
        self.found[FINAL] = {"prompts": counts}
        asked = self._drawn(groups, counts, MIXED)
        self._reinforce(model, asked, config.train, self.folder(FINAL), "all domains")

    def evaluate(self, name: str, domains: Sequence[str]) -> None:
        """Measures a model on held-out problems of those groups that it lacks. The base comes before the others.

        Figures at another difficulty than the group's are forgotten, of every model: a table has them side by side.
        """
        groups, evaluation = self.groups(domains), self.found.setdefault("evaluation", {})
        for known in evaluation.values():
            for group in groups:
                if known.get(group.name, {}).get("difficulty", group.difficulty) != group.difficulty:
                    del known[group.name]
        own = evaluation.setdefault(name, {})
        missing = [group for group in groups if group.name not in own]
        if not missing:
            return
        model, seed = self.load(self.path(name)), self.config.seed
        asked = [(g, g.examples("test", self.config.evaluation_of(g.domain), seed)) for g in missing]
        answers = iter(self._sample(model, f"{name} on held-out problems", asked, 1, temperature=0.0))
        measured = {}
        for group, examples in asked:
            mine = [*islice(answers, len(examples))]
            found = figures(mine, model.top_k if model.is_sparse else None, self._language)
            if name != BASE:
                found["gain"] = gain(found["scores"], evaluation[BASE][group.name]["scores"]).to_dict()
            measured[group.name] = {"difficulty": group.difficulty, **found}
        own |= measured  # all at once: Ctrl-C, whose figures are noted, leaves none that are half done
        self.watch.note()

    @cached_property
    def _language(self) -> LanguageShare | None:
        """What measures the language of answers; None without py3langid, which only its reward cannot do without."""
        return LanguageShare() if find_spec("py3langid") else None


def _prompts(stage: GrpoConfig) -> int:
    return stage.steps * stage.prompts
