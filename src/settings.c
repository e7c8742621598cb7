/*-------------------------------------------------------------------------
 *
 * settings.c
 *	  The settings of the module, for postgresql.conf.
 *
 * Any room may read them.  The options of a buffer are in options.c.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <limits.h>

#include "miscadmin.h"
#include "options.h"
#include "settings.h"
#include "utils/guc.h"

bool		statbuffer_preloaded;
int			statbuffer_ledger_size;
int			statbuffer_max_memory;
int			statbuffer_max_shutdown;
int			statbuffer_max_workers;

/* Define the settings, when the module is loaded. */
void
settings_init(void)
{
	statbuffer_preloaded = process_shared_preload_libraries_in_progress;
	DefineCustomIntVariable("statbuffer.ledger_size",
							"Sets the size from which the ledger of a database's durable buffers is rotated.",
							"It grows with each transaction that counts. When it has this size, and twice that of the counts that are not stored, only these are kept.",
							&statbuffer_ledger_size,
							64 * 1024,
							1024, MAX_KILOBYTES,
							PGC_SIGHUP,
							GUC_UNIT_KB,
							NULL, NULL, NULL);
	DefineCustomIntVariable("statbuffer.max_memory",
							"Sets the maximum amount of dynamic shared memory for counts.",
							"When most of it is in use, keys are flushed before they are due. When all of it is in use, increments of new keys are errors; those of keys already held still work.",
							&statbuffer_max_memory,
							256 * 1024,
							4 * 1024, MAX_KILOBYTES,
							PGC_SIGHUP,
							GUC_UNIT_KB,
							NULL, NULL, NULL);
	DefineCustomIntVariable("statbuffer.max_shutdown",
							"Sets the maximum time for the last flush of a buffer when the server stops.",
							"It limits the option \"shutdown\" of a buffer, which its owner sets. Counts that are not stored by then are saved to a file.",
							&statbuffer_max_shutdown,
							60 * 1000,
							0, SHUTDOWN_MAX_MSECS,
							PGC_SIGHUP,
							GUC_UNIT_MS,
							NULL, NULL, NULL);
	DefineCustomIntVariable("statbuffer.max_workers",
							"Sets the maximum number of worker processes that flush buffers at the same time.",
							"Worker processes are taken from the pool established by \"max_worker_processes\". When more buffers are busy, the workers take turns.",
							&statbuffer_max_workers,
							4,
							1, 1024,
							PGC_SIGHUP,
							0,
							NULL, NULL, NULL);
	MarkGUCPrefixReserved("statbuffer");
}
