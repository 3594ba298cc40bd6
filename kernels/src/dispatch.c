/* The public functions: each calls the kernel of the instruction set in use, at load the best that the processor has. */
#include <stddef.h>

#include "cpu.h"
#include "table.h"

#define DECLARE_TABLE(isa) extern const rk_table rk_table_of_##isa;
RK_FOR_EACH_ISA(DECLARE_TABLE)

#define ENTRY(isa) {#isa, cpu_##isa, &rk_table_of_##isa},
static const struct {
    const char *name;
    int (*supported)(void);
    const rk_table *table;
} sets[] = {RK_FOR_EACH_ISA(ENTRY)};

#define COUNT ((int32_t)(sizeof sets / sizeof sets[0]))
static int32_t selected = COUNT - 1;

__attribute__((constructor)) static void select_best(void) {
    for (selected = 0; !sets[selected].supported(); selected++)
        ;
}

int32_t rk_version(void) { return RK_VERSION; }
int32_t rk_selected(void) { return selected; }
const char *rk_instruction_set(int32_t i) { return i >= 0 && i < COUNT ? sets[i].name : NULL; }
int32_t rk_supported(int32_t i) { return i >= 0 && i < COUNT && sets[i].supported(); }

int32_t rk_select(int32_t i) {
    if (!rk_supported(i))
        return -1;
    selected = i;
    return 0;
}

#define FORWARD(name) \
    int64_t rk_##name##_units(const rk_##name##_args *a) { return sets[selected].table->name##_units(a); } \
    void rk_##name(const rk_##name##_args *a, int64_t begin, int64_t end) { sets[selected].table->name(a, begin, end); }
RK_FOR_EACH_KERNEL(FORWARD)
