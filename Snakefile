# The entry of the workflow: which campaign, and what to build of it.
# How each thing is built is in workflow/rules/, one file a stage.
from pathlib import Path

from snakemake.utils import min_version

from t2v_energy.dag import read_dag

min_version("9.25")


configfile: "config/config.yaml"


DAG = read_dag(Path(workflow.basedir), config)


pathvars:
    campaign=DAG.campaign,
    figures=DAG.figures,
    raw=f"results/raw/{DAG.campaign}",
    aggregated=f"results/aggregated/{DAG.campaign}",
    tables=f"results/tables/{DAG.campaign}",
    numbers=f"results/numbers/{DAG.campaign}",


include: "workflow/rules/prompts.smk"
include: "workflow/rules/measure.smk"
include: "workflow/rules/aggregate.smk"
include: "workflow/rules/analysis.smk"
include: "workflow/rules/paper.smk"


rule all:
    default_target: True
    localrule: True
    input:
        rules.figures.input,
        rules.tables.input,
        rules.paper.input if DAG.is_paper_campaign else [],
