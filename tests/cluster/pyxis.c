/* Stand-in for NVIDIA's pyxis: takes the options of srun that name a container, starts none, and appends what it was given
 * to the file $MINITRON_TEST_CLUSTER/pyxis.txt, a line a task: node option=value ... */
#include <slurm/spank.h>
#include <stdio.h>
#include <string.h>

SPANK_PLUGIN(pyxis, 1);

static struct spank_option options[] = {
    {"container-image", "IMAGE", "stand-in", 1, 0, NULL},
    {"container-mounts", "MOUNTS", "stand-in", 1, 1, NULL},
    {"container-workdir", "FOLDER", "stand-in", 1, 2, NULL},
    {"no-container-mount-home", NULL, "stand-in", 0, 3, NULL},
};
enum { COUNT = sizeof options / sizeof *options };
static char given[COUNT][4096];

static int take(int number, const char *value, int remote)
{
    (void)remote;
    snprintf(given[number], sizeof given[number], "%s", value && *value ? value : "yes");
    return 0;
}

int slurm_spank_init(spank_t spank, int argc, char **argv)
{
    (void)argc;
    (void)argv;
    for (int i = 0; i < COUNT; i++) {
        options[i].cb = take;
        if (spank_option_register(spank, &options[i]) != ESPANK_SUCCESS)
            return -1;
    }
    return 0;
}

int slurm_spank_task_init(spank_t spank, int argc, char **argv)
{
    char root[2048], node[256], path[2100];
    (void)argc;
    (void)argv;
    if (!given[0][0] || spank_getenv(spank, "MINITRON_TEST_CLUSTER", root, sizeof root) || spank_getenv(spank, "SLURMD_NODENAME", node, sizeof node))
        return 0;
    snprintf(path, sizeof path, "%s/pyxis.txt", root);
    FILE *file = fopen(path, "a");
    if (!file)
        return -1;
    fprintf(file, "%s", node);
    for (int i = 0; i < COUNT; i++)
        if (given[i][0])
            fprintf(file, " %s=%s", options[i].name, given[i]);
    fprintf(file, "\n");
    return fclose(file);
}
