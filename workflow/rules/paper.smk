# The paper: every number of its text comes from one file, made by one rule.
rule numbers:
    input:
        [output.numbers for output in ANALYSES if hasattr(output, "numbers")],
    output:
        "<numbers>.json",
    log:
        "logs/numbers/<campaign>.log",
    conda:
        "../../envs/analysis.yaml"
    message:
        "Collect the numbers of the paper's text"
    shell:
        "t2v-energy numbers --out {output} {input} 2> {log}"


rule compile_paper:
    input:
        source="paper/paper.typ",
        bibliography="paper/references.bib",
        figures=rules.figures.input,
        tables=rules.tables.input,
        numbers=rules.numbers.output,
        beside=BESIDE_TABLES,
    output:
        "paper/paper.pdf",
    log:
        "logs/paper.log",
    conda:
        "../../envs/analysis.yaml"
    params:
        campaign=STUDY.settings.paper_campaign,
    message:
        "Compile the paper"
    shell:
        "t2v-energy paper --campaign {params.campaign} --source {input.source} --out {output} 2> {log}"


rule paper:
    input:
        rules.compile_paper.output,
    localrule: True
