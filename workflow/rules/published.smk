# A campaign that is made of tables which others published: they are fetched unless copies are given, and put into
# the form of stage 3.  The campaign's file pins their checksums.
for SOURCE, FILE in STUDY.plan.campaign.sources.items():

    rule:
        name:
            f"fetch_{SOURCE}"
        output:
            (
                ensure(STUDY.fetched_file(SOURCE), sha256=FILE.sha256)
                if FILE.sha256
                else STUDY.fetched_file(SOURCE)
            ),
        log:
            f"logs/published/<campaign>/{SOURCE}.log",
        retries: 1
        localrule: True
        conda:
            "../../envs/analysis.yaml"
        params:
            campaign=STUDY.campaign,
            source=SOURCE,
        message:
            "Fetch a published table of campaign {params.campaign}: {params.source}"
        shell:
            "t2v-energy fetch --campaign {params.campaign} --source {params.source} --out {output} 2> {log}"


if STUDY.is_published:

    rule adapt:
        input:
            **STUDY.published_files,
            campaign="config/campaigns/<campaign>.yaml",
            models=STUDY.compared_files,
            code=STUDY.sources("published", "audit", "work"),
        output:
            "<aggregated>/configurations.csv",
        log:
            "logs/published/<campaign>/adapt.log",
        conda:
            "../../envs/analysis.yaml"
        params:
            files=STUDY.published_options,
        message:
            "Stage 3: the published tables in our form"
        shell:
            "t2v-energy adapt {params.files} --out {output} 2> {log}"
