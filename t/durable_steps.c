/*
 * Stops processes at a step of what statbuffer does, so that a test can kill them
 * exactly there.  To be preloaded after statbuffer.
 *
 * Calls of some of the server's functions by statbuffer are led through here, by
 * changing statbuffer's table of addresses, and transactions report their ends.
 * Each gives a step, of which the text is
 *
 *		client: before heap_insert sb_ledger_0
 *		worker: COMMIT
 *		keeper rotating the ledger of durable buffers: after WaitForLockers
 *
 * The file POINT, if it is there, has a line with what to do, "stop" or "error",
 * and a pattern of such texts.  Who is first at one of these renames the file to
 * REACHED, appends its process ID, and stops until it is killed, or raises an error.
 */
#define _GNU_SOURCE
#include "postgres.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <link.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include "access/xact.h"
#include "fmgr.h"
#include "miscadmin.h"
#include "postmaster/bgworker.h"
#include "utils/backend_status.h"
#include "utils/rel.h"

PG_MODULE_MAGIC;

static const char *
process(void)
{
	static char text[256];
	const char *function;

	if (MyBgworkerEntry == NULL)
		return MyBackendType == B_BACKEND ? "client" : "other";
	function = MyBgworkerEntry->bgw_function_name;
	if (strcmp(function, "statbuffer_keeper_main") != 0)
		return strstr(function, "worker") ? "worker" : "other";
	snprintf(text, sizeof(text), "keeper %s",
			 MyBEEntry && MyBEEntry->st_activity_raw ? MyBEEntry->st_activity_raw : "");
	return text;
}

static void
step(const char *when, const char *name)
{
	char		line[512];
	char		text[512];
	char	   *pattern;
	int			file;
	int			len;

	/* not while a session begins */
	if (!IsNormalProcessingMode())
		return;
	file = open(POINT, O_RDONLY | O_CLOEXEC);
	if (file < 0)
		return;
	len = read(file, line, sizeof(line) - 1);
	close(file);
	if (len <= 0)
		return;
	line[len] = '\0';
	line[strcspn(line, "\n")] = '\0';
	pattern = strchr(line, ' ');
	if (pattern == NULL)
		return;
	*pattern++ = '\0';
	snprintf(text, sizeof(text), "%s: %s%s", process(), when, name);
	if (fnmatch(pattern, text, 0) != 0 || rename(POINT, REACHED ".new") != 0)
		return;

	file = open(REACHED ".new", O_WRONLY | O_APPEND | O_CLOEXEC);
	len = snprintf(text, sizeof(text), "%d\n", (int) getpid());
	(void) write(file, text, len);
	close(file);
	(void) rename(REACHED ".new", REACHED);
	if (strcmp(line, "error") == 0)
		ereport(ERROR,
				(errcode(ERRCODE_DISK_FULL),
				 errmsg("as if the disk was full")));
	raise(SIGSTOP);
}

/*
 * Functions, with as many arguments as any of them has.  It does no harm to pass
 * on more than there are.
 */
#define ARGUMENTS	long a, long b, long c, long d, long e, long f, long g, long h

typedef long (*Function) (ARGUMENTS);

#define WRAPPER(name) \
	static Function real_##name; \
	static long \
	wrap_##name(ARGUMENTS) \
	{ \
		long		result; \
		step("before ", #name); \
		result = real_##name(a, b, c, d, e, f, g, h); \
		step("after ", #name); \
		return result; \
	}

WRAPPER(simple_heap_delete)
WRAPPER(heap_getnext)
WRAPPER(WaitForLockers)
WRAPPER(RelationSetNewRelfilenode)
WRAPPER(RelationSetNewRelfilenumber)
WRAPPER(CommitTransactionCommand)
WRAPPER(standard_ProcessUtility)

static Function real_heap_insert;

static long
wrap_heap_insert(ARGUMENTS)
{
	char		name[NAMEDATALEN + 20];
	long		result;

	snprintf(name, sizeof(name), "heap_insert %s", RelationGetRelationName((Relation) a));
	step("before ", name);
	result = real_heap_insert(a, b, c, d, e, f, g, h);
	step("after ", name);
	return result;
}

/* Before that of statbuffer, by which it tells others what was counted. */
static void
xact_callback(XactEvent event, void *arg)
{
	if (event == XACT_EVENT_COMMIT)
		step("", "COMMIT");
	else if (event == XACT_EVENT_PREPARE)
		step("", "PREPARE");
}

/* Callbacks are called in the reverse order of their registration. */
static Function real_RegisterXactCallback;

static long
wrap_RegisterXactCallback(ARGUMENTS)
{
	real_RegisterXactCallback(a, b, c, d, e, f, g, h);
	RegisterXactCallback(xact_callback, NULL);
	return 0;
}

static const struct
{
	const char *name;
	Function	wrapper;
	Function   *real;
}			wrappers[] =
{
#define ENTRY(name) {#name, wrap_##name, &real_##name}
	ENTRY(heap_insert),
	ENTRY(simple_heap_delete),
	ENTRY(heap_getnext),
	ENTRY(WaitForLockers),
	ENTRY(RelationSetNewRelfilenode),
	ENTRY(RelationSetNewRelfilenumber),
	ENTRY(CommitTransactionCommand),
	ENTRY(standard_ProcessUtility),
	ENTRY(RegisterXactCallback)
};

/* Look through a table of addresses. */
static void
redirect(struct link_map *map, const ElfW(Rela) *table, size_t size,
		 const ElfW(Sym) *symbols, const char *names)
{
	for (size_t i = 0; i < size / sizeof(*table); i++)
	{
		const char *name = names + symbols[ELF64_R_SYM(table[i].r_info)].st_name;
		Function   *slot = (Function *) (map->l_addr + table[i].r_offset);
		uintptr_t	page = sysconf(_SC_PAGESIZE);

		for (int j = 0; j < lengthof(wrappers); j++)
		{
			if (strcmp(name, wrappers[j].name) != 0)
				continue;
			if (mprotect((void *) ((uintptr_t) slot & ~(page - 1)), page,
						 PROT_READ | PROT_WRITE) != 0)
				elog(FATAL, "could not make a page writable: %m");
			*wrappers[j].real = *slot;
			*slot = wrappers[j].wrapper;
		}
	}
}

void
_PG_init(void)
{
	void	   *handle;
	struct link_map *map;
	const ElfW(Sym) *symbols = NULL;
	const char *names = NULL;
	const ElfW(Rela) *calls = NULL;
	const ElfW(Rela) *others = NULL;
	size_t		calls_size = 0;
	size_t		others_size = 0;

	(void) load_external_function("$libdir/statbuffer", "statbuffer_keeper_main", true, &handle);
	if (dlinfo(handle, RTLD_DI_LINKMAP, &map) != 0)
		elog(FATAL, "could not find the library: %s", dlerror());
	for (ElfW(Dyn) *entry = map->l_ld; entry->d_tag != DT_NULL; entry++)
	{
		void	   *at = (void *) entry->d_un.d_ptr;

		switch (entry->d_tag)
		{
			case DT_SYMTAB:
				symbols = at;
				break;
			case DT_STRTAB:
				names = at;
				break;
			case DT_JMPREL:
				calls = at;
				break;
			case DT_PLTRELSZ:
				calls_size = entry->d_un.d_val;
				break;
			case DT_RELA:
				others = at;
				break;
			case DT_RELASZ:
				others_size = entry->d_un.d_val;
				break;
		}
	}
	redirect(map, calls, calls_size, symbols, names);
	redirect(map, others, others_size, symbols, names);
	RegisterXactCallback(xact_callback, NULL);
}
