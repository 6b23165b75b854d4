# The models of other sealed campaigns, which the paper sets beside its own: stage 3, and of stage 4 one notebook.
BESIDE = {dag.campaign: dag for dag in STUDY.beside}
BESIDE_TABLES = [
    f"results/tables/{campaign}/{name}.csv"
    for campaign in BESIDE
    for name in MODELS_TABLES
]


rule aggregate_beside:
    input:
        measurements=lambda wildcards: BESIDE[wildcards.beside].measurements,
        models=lambda wildcards: BESIDE[wildcards.beside].model_files,
        code=AGGREGATION_CODE,
    output:
        parquet="results/aggregated/{beside}/measurements.parquet",
        csv="results/aggregated/{beside}/configurations.csv",
    log:
        "logs/aggregate/{beside}.log",
    wildcard_constraints:
        beside="|".join(BESIDE) or "(?!)",
    conda:
        "../../envs/analysis.yaml"
    message:
        "Stage 3: aggregate the records of campaign {wildcards.beside}, for the paper"
    shell:
        "t2v-energy aggregate --campaign {wildcards.beside} --parquet {output.parquet} --csv {output.csv} 2> {log}"


rule models_beside:
    input:
        notebook="workflow/notebooks/models.ipynb",
        configurations="results/aggregated/{beside}/configurations.csv",
        records=lambda wildcards: BESIDE[wildcards.beside].measurements,
        configs=lambda wildcards: BESIDE[wildcards.beside].compared_files,
        code=STUDY.sources("analysis", "work", "study.py", "measurement/validity.py"),
    output:
        figures=[
            f"results/figures/{{beside}}/{name}{end}"
            for name in MODELS_FIGURES
            for end in FORMATS
        ],
        tables=[
            *[f"results/tables/{{beside}}/{name}.csv" for name in MODELS_TABLES],
            "results/tables/{beside}/table2.tex",
            "results/tables/{beside}/table4.tex",
        ],
        numbers="results/numbers/{beside}/models.json",
    log:
        notebook="logs/notebooks/{beside}/models.ipynb",
        console="logs/notebooks/{beside}/models.log",
    wildcard_constraints:
        beside="|".join(BESIDE) or "(?!)",
    retries: NOTEBOOK_RETRIES
    conda:
        "../../envs/analysis.yaml"
    params:
        figures=lambda wildcards, output: Path(output.figures[0]).parent,
        records=lambda wildcards: f"results/raw/{wildcards.beside}",
        tables=lambda wildcards, output: Path(output.tables[0]).parent,
    message:
        "Stage 4: models of campaign {wildcards.beside}, for the paper"
    shell:
        "papermill -k python3 --no-progress-bar --cwd . -p campaign {wildcards.beside} "
        "-p configurations {input.configurations} -p records {params.records} -p tables {params.tables} "
        "-p figures {params.figures} -p numbers {output.numbers} {input.notebook} {log.notebook} > {log.console} 2>&1"
