# Stage 4: papermill notebooks make figures, tables and numbers.  The executed notebook is a log and not an
# output, so it stays when a cell fails.  A campaign gets what its experiments have data for.
# Kernels choose their ports before they open them: of many that start at once one may find its own taken.
NOTEBOOK_RETRIES = 1
FORMATS = (".pdf", ".png", ".svg")
MODELS_FIGURES = ("fig1", "fig5", "fig5b")
MODELS_TABLES = (
    "table2",
    "table4",
    "broader",
    "components",
    "memory",
    "signs",
    "operators",
    "prompts",
)
RECORDS = f"results/raw/{STUDY.campaign}"


if STUDY.sweep_figures:

    rule sweeps:
        input:
            notebook="workflow/notebooks/sweeps.ipynb",
            configurations="<aggregated>/configurations.csv",
            records=STUDY.measurements,
            models=STUDY.model_files,
            code=STUDY.sources("analysis", "work"),
        output:
            figures=[
                f"<figures>/{name}{end}"
                for name in STUDY.sweep_figures
                for end in FORMATS
            ],
            tables=multiext("<tables>/table3", ".csv", ".tex"),
            numbers="<numbers>/sweeps.json",
        log:
            notebook="logs/notebooks/<campaign>/sweeps.ipynb",
            console="logs/notebooks/<campaign>/sweeps.log",
        retries: NOTEBOOK_RETRIES
        conda:
            "../../envs/analysis.yaml"
        params:
            campaign=STUDY.campaign,
            figures=lambda wildcards, output: Path(output.figures[0]).parent,
            records=lambda wildcards: RECORDS,
            table=lambda wildcards, output: output.tables[0].removesuffix(".csv"),
        message:
            "Stage 4: figures 2 to 4 and table 3 of campaign {STUDY.campaign}"
        shell:
            "papermill -k python3 --no-progress-bar --cwd . -p campaign {params.campaign} "
            "-p configurations {input.configurations} -p records {params.records} -p figures {params.figures} "
            "-p table {params.table} -p numbers {output.numbers} {input.notebook} {log.notebook} > {log.console} 2>&1"

    rule scaling:
        input:
            notebook="workflow/notebooks/scaling.ipynb",
            configurations="<aggregated>/configurations.csv",
            models=STUDY.model_files,
            code=STUDY.sources("analysis", "work"),
        output:
            figures=multiext("<figures>/exponents", *FORMATS),
            tables=expand(
                "<tables>/{name}.csv",
                name=(
                    "scaling",
                    "regime_fits",
                    "regimes",
                    "doubling",
                    "efficiency",
                    "power",
                    "steps",
                ),
            ),
            numbers="<numbers>/scaling.json",
        log:
            notebook="logs/notebooks/<campaign>/scaling.ipynb",
            console="logs/notebooks/<campaign>/scaling.log",
        retries: NOTEBOOK_RETRIES
        conda:
            "../../envs/analysis.yaml"
        params:
            campaign=STUDY.campaign,
            figure=lambda wildcards, output: output.figures[0].removesuffix(".pdf"),
            tables=lambda wildcards, output: Path(output.tables[0]).parent,
        message:
            "Stage 4: scaling laws of campaign {STUDY.campaign}"
        shell:
            "papermill -k python3 --no-progress-bar --cwd . -p campaign {params.campaign} "
            "-p configurations {input.configurations} -p tables {params.tables} -p figure {params.figure} "
            "-p numbers {output.numbers} {input.notebook} {log.notebook} > {log.console} 2>&1"

    rule breakdown:
        input:
            notebook="workflow/notebooks/breakdown.ipynb",
            configurations="<aggregated>/configurations.csv",
            records=STUDY.measurements,
            models=STUDY.model_files,
            grids="config/grids.yaml",
            code=STUDY.sources(
                "analysis", "work", "metering/attribution.py", "grids.py"
            ),
        output:
            figures=[
                f"<figures>/{name}{end}"
                for name in ("stages", "codecarbon")
                for end in FORMATS
            ],
            tables=[
                *expand(
                    "<tables>/{name}.csv",
                    name=(
                        "stages",
                        "stages_once",
                        "codecarbon",
                        "cost",
                        "cost_carbon",
                    ),
                ),
                "<tables>/cost.tex",
            ],
            numbers="<numbers>/breakdown.json",
        log:
            notebook="logs/notebooks/<campaign>/breakdown.ipynb",
            console="logs/notebooks/<campaign>/breakdown.log",
        retries: NOTEBOOK_RETRIES
        conda:
            "../../envs/analysis.yaml"
        params:
            campaign=STUDY.campaign,
            figures=lambda wildcards, output: Path(output.figures[0]).parent,
            records=lambda wildcards: RECORDS,
            tables=lambda wildcards, output: Path(output.tables[0]).parent,
        message:
            "Stage 4: stages, CodeCarbon and what measuring campaign {STUDY.campaign} cost"
        shell:
            "papermill -k python3 --no-progress-bar --cwd . -p campaign {params.campaign} "
            "-p configurations {input.configurations} -p records {params.records} -p tables {params.tables} "
            "-p figures {params.figures} -p numbers {output.numbers} {input.notebook} {log.notebook} > {log.console} 2>&1"


if STUDY.compares:

    rule comparison:
        input:
            notebook="workflow/notebooks/comparison.ipynb",
            configurations="<aggregated>/configurations.csv",
            records=STUDY.measurements,
            models=STUDY.model_files,
            code=STUDY.sources(
                "analysis",
                "work",
                "metering/attribution.py",
                "measurement/composition.py",
            ),
        output:
            figures=multiext("<figures>/settling", *FORMATS)
            + (multiext("<figures>/kernels", *FORMATS) if STUDY.has("kernels") else []),
            tables=expand(
                "<tables>/{name}.csv",
                name=(
                    "validation",
                    "validation_steps",
                    "validation_drift",
                    "settling",
                    "kernels",
                    "kernels_fit",
                    *(["neighbour"] if STUDY.has("neighbour") else []),
                ),
            ),
            numbers="<numbers>/comparison.json",
        log:
            notebook="logs/notebooks/<campaign>/comparison.ipynb",
            console="logs/notebooks/<campaign>/comparison.log",
        retries: NOTEBOOK_RETRIES
        conda:
            "../../envs/analysis.yaml"
        params:
            campaign=STUDY.campaign,
            figures=lambda wildcards: STUDY.figures,
            records=lambda wildcards: RECORDS,
            tables=lambda wildcards, output: Path(output.tables[0]).parent,
        message:
            "Stage 4: whole against sampled generations, and attention kernels, of campaign {STUDY.campaign}"
        shell:
            "papermill -k python3 --no-progress-bar --cwd . -p campaign {params.campaign} "
            "-p configurations {input.configurations} -p records {params.records} -p tables {params.tables} "
            "-p figures {params.figures} -p numbers {output.numbers} {input.notebook} {log.notebook} > {log.console} 2>&1"


if STUDY.compares_models:

    rule models:
        input:
            notebook="workflow/notebooks/models.ipynb",
            configurations="<aggregated>/configurations.csv",
            records=STUDY.measurements,
            configs=STUDY.compared_files,
            code=STUDY.sources(
                "analysis", "work", "study.py", "measurement/validity.py"
            ),
        output:
            figures=[
                f"<figures>/{name}{end}" for name in MODELS_FIGURES for end in FORMATS
            ],
            tables=[
                *expand(
                    "<tables>/{name}.csv",
                    name=MODELS_TABLES,
                ),
                "<tables>/table2.tex",
                "<tables>/table4.tex",
            ],
            numbers="<numbers>/models.json",
        log:
            notebook="logs/notebooks/<campaign>/models.ipynb",
            console="logs/notebooks/<campaign>/models.log",
        retries: NOTEBOOK_RETRIES
        conda:
            "../../envs/analysis.yaml"
        params:
            campaign=STUDY.campaign,
            figures=lambda wildcards, output: Path(output.figures[0]).parent,
            records=lambda wildcards: RECORDS,
            tables=lambda wildcards, output: Path(output.tables[0]).parent,
        message:
            "Stage 4: figures 1 and 5, tables 2 and 4 of campaign {STUDY.campaign}"
        shell:
            "papermill -k python3 --no-progress-bar --cwd . -p campaign {params.campaign} "
            "-p configurations {input.configurations} -p records {params.records} -p tables {params.tables} "
            "-p figures {params.figures} -p numbers {output.numbers} {input.notebook} {log.notebook} > {log.console} 2>&1"


if STUDY.operator_records:

    rule operators:
        input:
            notebook="workflow/notebooks/operators.ipynb",
            rates="<aggregated>/operator_rates.csv",
            models=STUDY.compared_files,
            presumed="config/prediction.yaml",
            shipped=STUDY.shipped_calibrations,
            code=STUDY.sources("analysis", "prediction", "work"),
        output:
            figures=[
                f"<figures>/{name}{end}"
                for name in ("alignment", "roofline")
                for end in FORMATS
            ],
            tables=expand("<tables>/{name}.csv", name=("alignment", "roofline")),
            rates="<calibrations>_rates.json",
            numbers="<numbers>/operators.json",
        log:
            notebook="logs/notebooks/<campaign>/operators.ipynb",
            console="logs/notebooks/<campaign>/operators.log",
        retries: NOTEBOOK_RETRIES
        conda:
            "../../envs/analysis.yaml"
        params:
            campaign=STUDY.campaign,
            figures=lambda wildcards: STUDY.figures,
            tables=lambda wildcards, output: Path(output.tables[0]).parent,
        message:
            "Stage 4: single operators of campaign {STUDY.campaign}: alignment, rates and rooflines"
        shell:
            "papermill -k python3 --no-progress-bar --cwd . -p campaign {params.campaign} "
            "-p operator_rates {input.rates} -p tables {params.tables} -p figures {params.figures} "
            "-p rates {output.rates} -p numbers {output.numbers} "
            "{input.notebook} {log.notebook} > {log.console} 2>&1"


if STUDY.predicts:

    rule prediction:
        input:
            notebook="workflow/notebooks/prediction.ipynb",
            configurations="<aggregated>/configurations.csv",
            models=STUDY.model_files,
            presumed="config/prediction.yaml",
            rates=STUDY.shipped_rates,
            study="config/study.yaml",
            code=STUDY.sources("analysis", "prediction", "work"),
        output:
            figures=multiext("<figures>/fig6", *FORMATS),
            tables=multiext(
                "<tables>/table3b", ".csv", ".tex", "_points.csv", "_random.csv"
            ),
            calibration="<calibrations>.json",
            numbers="<numbers>/prediction.json",
        log:
            notebook="logs/notebooks/<campaign>/prediction.ipynb",
            console="logs/notebooks/<campaign>/prediction.log",
        retries: NOTEBOOK_RETRIES
        conda:
            "../../envs/analysis.yaml"
        params:
            campaign=STUDY.campaign,
            figure=lambda wildcards, output: output.figures[0].removesuffix(".pdf"),
            table=lambda wildcards, output: output.tables[0].removesuffix(".csv"),
        message:
            "Stage 4: the calibrated cost model, table 3b and figure 6 of campaign {STUDY.campaign}"
        shell:
            "papermill -k python3 --no-progress-bar --cwd . -p campaign {params.campaign} "
            "-p configurations {input.configurations} -p table {params.table} -p figure {params.figure} "
            "-p calibration {output.calibration} -p numbers {output.numbers} "
            "{input.notebook} {log.notebook} > {log.console} 2>&1"


if STUDY.saves:

    rule interventions:
        input:
            notebook="workflow/notebooks/interventions.ipynb",
            configurations="<aggregated>/configurations.csv",
            models=STUDY.model_files,
            catalogue="config/interventions.yaml",
            presumed=STUDY.savings_files,
            code=STUDY.sources("analysis", "interventions", "prediction", "work"),
        output:
            figures=[
                f"<figures>/{name}{end}"
                for name in ("fig7", "fig8")
                for end in FORMATS
            ],
            tables=expand(
                "<tables>/{name}.csv",
                name=(
                    "interventions",
                    "interventions_budget",
                    "merging",
                    "merging_methods",
                ),
            ),
            numbers="<numbers>/interventions.json",
        log:
            notebook="logs/notebooks/<campaign>/interventions.ipynb",
            console="logs/notebooks/<campaign>/interventions.log",
        retries: NOTEBOOK_RETRIES
        conda:
            "../../envs/analysis.yaml"
        params:
            campaign=STUDY.campaign,
            figures=lambda wildcards, output: Path(output.figures[0]).parent,
            tables=lambda wildcards, output: Path(output.tables[0]).parent,
        message:
            "Stage 4: what interventions save, predicted and measured, in campaign {STUDY.campaign}"
        shell:
            "papermill -k python3 --no-progress-bar --cwd . -p campaign {params.campaign} "
            "-p configurations {input.configurations} -p tables {params.tables} -p figures {params.figures} "
            "-p numbers {output.numbers} {input.notebook} {log.notebook} > {log.console} 2>&1"


# The study's own theory: about its model and the accelerators of config/, whatever the campaign measured.
rule theory:
    input:
        notebook="workflow/notebooks/theory.ipynb",
        configurations="<aggregated>/configurations.csv",
        models=STUDY.model_files,
        configs=STUDY.study_files,
        code=STUDY.sources("analysis", "work"),
    output:
        tables=multiext(
            "<tables>/",
            *[
                f"{name}{end}"
                for name in ("table1", "table5", "table6", "table7", "table7b")
                for end in (".csv", ".tex")
            ],
        ),
        numbers="<numbers>/theory.json",
    log:
        notebook="logs/notebooks/<campaign>/theory.ipynb",
        console="logs/notebooks/<campaign>/theory.log",
    retries: NOTEBOOK_RETRIES
    conda:
        "../../envs/analysis.yaml"
    params:
        campaign=STUDY.campaign,
        tables=lambda wildcards, output: Path(output.tables[0]).parent,
    message:
        "Stage 4: tables 1, 5, 6 and 7"
    shell:
        "papermill -k python3 --no-progress-bar --cwd . -p campaign {params.campaign} "
        "-p configurations {input.configurations} -p tables {params.tables} -p numbers {output.numbers} "
        "{input.notebook} {log.notebook} > {log.console} 2>&1"


if STUDY.is_published:

    rule published:
        input:
            **STUDY.published_files,
            notebook="workflow/notebooks/published.ipynb",
            configurations="<aggregated>/configurations.csv",
            configs=STUDY.compared_files,
            claims="config/claims.yaml",
            code=STUDY.sources(
                "analysis", "audit", "claims", "published", "study.py", "work"
            ),
        output:
            figures=[
                f"<figures>/{name}{end}"
                for name in STUDY.published_figures
                for end in FORMATS
            ],
            tables=expand("<tables>/{name}.csv", name=STUDY.published_tables),
        log:
            notebook="logs/notebooks/<campaign>/published.ipynb",
            console="logs/notebooks/<campaign>/published.log",
        retries: NOTEBOOK_RETRIES
        conda:
            "../../envs/analysis.yaml"
        params:
            campaign=STUDY.campaign,
            files=lambda wildcards, input: " ".join(
                f"-p {source} {path}" for source, path in STUDY.published_files.items()
            ),
            figures=lambda wildcards: STUDY.figures,
            tables=lambda wildcards, output: Path(output.tables[0]).parent,
        message:
            "Stage 4: what the published tables of campaign {STUDY.campaign} allow"
        shell:
            "papermill -k python3 --no-progress-bar --cwd . -p campaign {params.campaign} {params.files} "
            "-p configurations {input.configurations} -p tables {params.tables} -p figures {params.figures} "
            "{input.notebook} {log.notebook} > {log.console} 2>&1"


if STUDY.is_paper_campaign:

    # Without the authors' files, what needs them is `data absent`.
    rule claims:
        input:
            **STUDY.published_files,
            claims="config/claims.yaml",
            campaign="config/campaigns/published-h100.yaml",
            own=([rules.scaling.output.tables] if "scaling" in STUDY.analyses else []),
            configs=STUDY.compared_files,
            theory=STUDY.study_files,
            code=STUDY.sources("audit", "claims", "published", "study.py", "work"),
        output:
            tables="results/tables/claims.csv",
            numbers="<numbers>/claims.json",
        log:
            "logs/claims/<campaign>.log",
        conda:
            "../../envs/analysis.yaml"
        params:
            files=STUDY.published_options,
            tables=lambda wildcards: f"results/tables/{STUDY.campaign}",
        message:
            "Recompute what the study prints"
        shell:
            "t2v-energy claims --tables {params.tables} {params.files} --out {output.tables} "
            "--numbers {output.numbers} 2> {log}"


if "versus" in STUDY.analyses:

    rule versus:
        input:
            **STUDY.published_files,
            campaign="config/campaigns/published-h100.yaml",
            configurations="<aggregated>/configurations.csv",
            same_gpu=STUDY.same_gpu_configurations,
            configs=STUDY.compared_files,
            code=STUDY.sources("analysis", "audit", "published", "study.py", "work"),
        output:
            tables="results/tables/h100_vs_h200.csv",
            figures=[
                f"results/figures/h100_vs_h200/{name}{end}"
                for name in STUDY.overlaid_figures
                for end in FORMATS
            ],
        log:
            "logs/versus/<campaign>.log",
        conda:
            "../../envs/analysis.yaml"
        params:
            campaign=STUDY.campaign,
            files=STUDY.published_options,
            same_gpu=lambda wildcards, input: "".join(
                f"--same-gpu {path}" for path in input.same_gpu
            ),
            figures="results/figures/h100_vs_h200",
        message:
            "The study's H100 against campaign {STUDY.campaign}"
        shell:
            "t2v-energy versus --campaign {params.campaign} --configurations {input.configurations} {params.files} "
            "{params.same_gpu} --out {output.tables} --figures {params.figures} 2> {log}"


ANALYSES = [getattr(rules, name).output for name in STUDY.analyses]


rule figures:
    input:
        [output.figures for output in ANALYSES if hasattr(output, "figures")],
    localrule: True


rule tables:
    input:
        [output.tables for output in ANALYSES],
        rules.meter.output,
        rules.operator_rates.output if STUDY.operator_records else [],
    localrule: True
