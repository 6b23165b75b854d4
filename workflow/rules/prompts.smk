# Stage 1: the prompts of a campaign, from the seeded grammar or the user's own file.
rule prompts:
    input:
        "config/prompts.yaml",
        STUDY.settings.prompts.file or [],
    output:
        "results/prompts/<campaign>.jsonl",
    log:
        "logs/prompts/<campaign>.log",
    localrule: True
    conda:
        "../../envs/analysis.yaml"
    params:
        settings=STUDY.prompts_json,
    message:
        "Stage 1: write the prompts of campaign {STUDY.campaign}"
    shell:
        "t2v-energy prompts --settings {params.settings:q} --out {output} 2> {log}"
