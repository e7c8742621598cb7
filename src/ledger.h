/*-------------------------------------------------------------------------
 *
 * ledger.h
 *	  The ledger of a database's durable buffers.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#ifndef STATBUFFER_LEDGER_H
#define STATBUFFER_LEDGER_H

#include "access/htup.h"
#include "nodes/pg_list.h"
#include "nodes/primnodes.h"
#include "shape.h"
#include "shmem.h"
#include "utils/relcache.h"
#include "utils/snapshot.h"

/*
 * The most bytes of a body.  A row of this size is not toasted, because the
 * column's storage is PLAIN, and two of them fit on a page.
 */
#define LEDGER_BODY_SIZE	3900

/* What is wanted of a database's keeper; a set.  The first bits are its tasks. */
#define LEDGER_LOAD			0x01	/* load what memory does not have */
#define LEDGER_SWEEP		0x02	/* look at what was prepared */
#define LEDGER_ROTATE		0x04	/* the current ledger is too large */
#define LEDGER_URGENT		0x08	/* a session waits for LEDGER_LOAD */

#define LEDGER_TASKS		3

/* LedgerTask.again_at: not again, unless it is wanted */
#define LEDGER_NEVER		PG_INT64_MAX

/*
 * One of the tasks of a keeper.  Written by the keeper; read without a lock, for
 * a wrong guess costs a needless wake-up.
 */
typedef struct LedgerTask
{
	ClockTime	not_before;		/* it has failed, and is not tried again
								 * before this, even if it is wanted */
	ClockTime	again_at;		/* it is to be done then, even if it is not
								 * wanted; while it is being done: 0 */
	int			failures;		/* in a row */
}			LedgerTask;

/*
 * A database with durable buffers, as all processes see it.  It is made by the
 * first process that needs it, and removed when the database is gone.
 *
 * `keeper', and what is about the start of one, is protected by
 * SharedControl.lock.  `current' is only changed by the
 * keeper.  `loaded' is set by the keeper, when no row of another incarnation is
 * left whose count is not in memory.  `wants' is set by any process, which then
 * wakes the launcher, and cleared by the keeper before it looks.  `nleft' is
 * what the last sweep has left: the keeper sets it.  `nrounds' is
 * the number of rounds that keepers have completed; who waits for one sleeps on
 * `cv'.
 */
typedef struct SharedDatabase
{
	Oid			dboid;			/* constant; must be first */
	uint64		incarnation;	/* a random number, not 0; constant */
	pid_t		keeper;			/* 0: none */
	Latch	   *latch;			/* the keeper's, or NULL; read without the
								 * lock, to wake it */
	ClockTime	start_after;	/* start no keeper before this */
	int			start_failures; /* how many in a row have not connected */
	ClockTime	logged_at;		/* when a keeper last logged an error; 0:
								 * never.  For the keeper */
	LedgerTask	tasks[LEDGER_TASKS];
	pg_atomic_uint32 current;	/* to which of the ledgers one appends */
	pg_atomic_uint32 loaded;
	pg_atomic_uint32 wants;
	pg_atomic_uint32 nleft;		/* visible rows of sb_ledger_prepared that
								 * could not be counted */
	pg_atomic_uint64 nrounds;
	pg_atomic_uint64 rotate_at; /* size of the ledger in bytes from which it
								 * is rotated; 0: ledger_size */
	ConditionVariable cv;
} SharedDatabase;

/* The extension that they are of, in this database. */
typedef struct LedgerExtension
{
	Oid			schema;
	Oid			owner;
} LedgerExtension;

/* The relations of the ledger. */
typedef struct LedgerTables
{
	Oid			ledgers[2];
	Oid			prepared;
	Oid			epochs;
} LedgerTables;

/*
 * An epoch: a span in the life of a durable buffer, from TRUNCATE to TRUNCATE,
 * with keys of one shape.
 */
typedef struct LedgerEpoch
{
	uint64		number;
	Oid			relid;
	KeyShape   *shape;
	ItemPointerData tid;
} LedgerEpoch;

/* Keys of one epoch that are put together for a row. */
typedef struct LedgerBody
{
	uint64		epoch;
	int			used;			/* bytes of `data', with its header */
	char		data[LEDGER_BODY_SIZE];
} LedgerBody;

/* A table of the ledger that is open to insert rows. */
typedef struct LedgerWriter
{
	Relation	rel;
	SharedDatabase *database;
	bool		prepared;		/* it is the one of prepared transactions */
	bool		at_once;		/* rows are visible at once */
	uint64		incarnation;
} LedgerWriter;

/* A key of a row, as ledger_next_key() takes it from the body. */
typedef struct LedgerKey
{
	int64		count;
	uint16		len;			/* as in KeyBytes */
	const char *data;			/* the stored form; not aligned */
} LedgerKey;

/* A row that is being read. */
typedef struct LedgerRow
{
	uint64		epoch;
	uint64		incarnation;	/* 0: of no memory */
	bool		damaged;		/* it cannot be read, and has no keys */
	HeapTuple	tuple;
	const char *next;
	const char *end;
} LedgerRow;

typedef void (*LedgerVisitor) (LedgerRow *row, void *arg);

extern void ledger_init(void);
extern bool ledger_find_extension(LedgerExtension *extension);
extern bool ledger_find_tables(LedgerTables *tables, bool missing_ok);
extern SharedDatabase *ledger_database(Oid dboid, bool create);
extern void ledger_check_refresh(const RangeVar *name);
extern bool ledger_begin_walk(dshash_seq_status *walk);
extern void ledger_want(uint32 what);
extern void ledger_wake(SharedDatabase *database);
extern uint64 ledger_rotation_size(SharedDatabase *database);
extern bool ledger_claim_keeper(void);
extern void ledger_release_keeper(void);
extern void ledger_start_keeper_after(SharedDatabase *database,
									  ClockTime when);
extern bool ledger_evict_keeper(Oid dboid);

/* epochs */
extern List *ledger_read_epochs(Oid relid);
extern List *ledger_list_relations(List *epochs);
extern LedgerEpoch *ledger_make_epoch(Oid relid, const KeyShape *shape,
									  bool frozen);
extern void ledger_delete_epoch(const LedgerEpoch *epoch);

/* appending */
extern void ledger_open_current(LedgerWriter *writer, bool at_once);
extern void ledger_open_prepared(LedgerWriter *writer);
extern void ledger_begin_body(LedgerBody *body, uint64 epoch);
extern void ledger_put(LedgerWriter *writer, LedgerBody *body,
					   const char *data, uint16 len, int64 count);
extern void ledger_copy_row(LedgerWriter *writer, const LedgerRow *row);
extern void ledger_end_body(LedgerWriter *writer, LedgerBody *body);
extern void ledger_close(LedgerWriter *writer);

/* reading */
extern void ledger_scan(Relation rel, Snapshot snapshot, LedgerVisitor visit,
						void *arg);
extern bool ledger_next_key(LedgerRow *row, LedgerKey *key);

/* When a task is to be done, if nothing happens before. */
static inline ClockTime
ledger_task_due(SharedDatabase *database, int task)
{
	if (pg_atomic_read_u32(&database->wants) & (1 << task))
		return database->tasks[task].not_before;
	return database->tasks[task].again_at;
}

#endif							/* STATBUFFER_LEDGER_H */
