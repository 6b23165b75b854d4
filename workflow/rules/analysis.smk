# Stage 4: papermill notebooks make figures, tables and numbers.  The executed notebook is a log and not an
# output, so it stays when a cell fails.
rule resolution:
    input:
        notebook="workflow/notebooks/resolution.ipynb",
        configurations="<aggregated>/configurations.csv",
        records=STUDY.measurements,
        models=STUDY.model_files,
        code=STUDY.sources("analysis", "work"),
    output:
        figures=multiext("<figures>/fig2", ".pdf", ".png", ".svg"),
        tables=multiext("<tables>/table3", ".csv", ".tex"),
        numbers="<numbers>/resolution.json",
    log:
        notebook="logs/notebooks/<campaign>/resolution.ipynb",
        console="logs/notebooks/<campaign>/resolution.log",
    conda:
        "../../envs/analysis.yaml"
    params:
        campaign=STUDY.campaign,
        figure=lambda wildcards, output: output.figures[0].removesuffix(".pdf"),
        table=lambda wildcards, output: output.tables[0].removesuffix(".csv"),
    message:
        "Stage 4: figure 2 and table 3 of campaign {STUDY.campaign}"
    shell:
        "papermill -k python3 --no-progress-bar --cwd . -p campaign {params.campaign} "
        "-p configurations {input.configurations} -p figure {params.figure} -p table {params.table} "
        "-p numbers {output.numbers} {input.notebook} {log.notebook} > {log.console} 2>&1"


rule figures:
    input:
        rules.resolution.output.figures,
    localrule: True


rule tables:
    input:
        rules.resolution.output.tables,
        rules.meter.output,
    localrule: True
