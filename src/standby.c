/*-------------------------------------------------------------------------
 *
 * standby.c
 *	  What the ledger has of a durable buffer, on a standby.
 *
 * The counts are in the memory of the primary.  Here, the rows of the ledger
 * that are visible are added up.
 *
 * Both ledgers are locked before the snapshot is taken, and until they are
 * read: the primary empties one in the same transaction in which it carries over
 * to the other what counts, and a snapshot that is older would see neither.  The
 * locks are released at once, because they keep the standby from replaying the
 * next such transaction.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/table.h"
#include "ledger.h"
#include "standby.h"
#include "sums.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"

struct StandbyCounts
{
	KeySums		sums;			/* of NULL: whichever the epoch is */
	List	   *epochs;			/* whose keys can be read */
	uint64		last;			/* the epoch that was found last, or 0 */
};

/* Is it an epoch of the buffer, with keys that can be read? */
static bool
is_readable(StandbyCounts *counts, uint64 epoch)
{
	ListCell   *lc;

	if (epoch == counts->last)
		return true;
	foreach(lc, counts->epochs)
		if (((LedgerEpoch *) lfirst(lc))->number == epoch)
	{
		counts->last = epoch;
		return true;
	}
	return false;
}

/* Add the keys of a row: a LedgerVisitor. */
static void
add_row(LedgerRow *row, void *arg)
{
	StandbyCounts *counts = arg;

	if (is_readable(counts, row->epoch))
		sums_add_row(&counts->sums, NULL, row);
}

/*
 * Read what the ledger has of a buffer, and return the snapshot that saw it,
 * which the caller must unregister.  The result is in the current memory
 * context.
 */
StandbyCounts *
standby_read(SbBuffer *buffer, Snapshot *snapshot)
{
	StandbyCounts *counts = palloc0(sizeof(StandbyCounts));
	LedgerTables tables;
	Oid			relids[3];
	Relation	rels[lengthof(relids)];
	List	   *epochs;
	ListCell   *lc;

	sums_begin(&counts->sums, CurrentMemoryContext);
	ledger_find_tables(&tables, false);
	relids[0] = tables.ledgers[0];
	relids[1] = tables.ledgers[1];
	relids[2] = tables.prepared;
	for (int i = 0; i < lengthof(relids); i++)
		rels[i] = table_open(relids[i], AccessShareLock);

	/* of this moment, in a parallel plan, too */
	*snapshot = RegisterSnapshot(GetCatalogSnapshot(relids[0]));
	epochs = ledger_read_epochs(buffer->relid);
	foreach(lc, epochs)
		if (shape_can_read(buffer->shape->keys,
						   ((LedgerEpoch *) lfirst(lc))->shape))
		counts->epochs = lappend(counts->epochs, lfirst(lc));
	for (int i = 0; i < lengthof(relids); i++)
	{
		ledger_scan(rels[i], *snapshot, add_row, counts);
		table_close(rels[i], AccessShareLock);
	}
	return counts;
}

/* Visit each key that has a count. */
void
standby_visit(StandbyCounts *counts, StandbyVisitor visit, void *arg)
{
	keysums_iterator iterator;
	KeySum	   *entry;

	keysums_start_iterate(counts->sums.hash, &iterator);
	while ((entry = keysums_iterate(counts->sums.hash, &iterator)) != NULL)
	{
		CHECK_FOR_INTERRUPTS();
		if (entry->sum != 0)
			visit(&entry->key.bytes, entry->sum, arg);
	}
}

/* Get the count of a key.  Returns false if it has none. */
bool
standby_look_up(StandbyCounts *counts, const KeyBytes *key, int64 *count)
{
	SumKey		of_any = {.of = NULL,.bytes = *key};
	KeySum	   *entry = keysums_lookup(counts->sums.hash, of_any);

	if (entry == NULL || entry->sum == 0)
		return false;
	*count = entry->sum;
	return true;
}
