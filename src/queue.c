/*-------------------------------------------------------------------------
 *
 * queue.c
 *	  The buffers that wait for a worker.
 *
 * When there are more buffers with due keys than workers, the launcher lists
 * those that have waited longest, in that order.  A worker that can do without
 * its buffer for a while asks the queue: it is given a buffer that it can serve,
 * which is one of the same database and owner, or it leaves, and the launcher
 * starts a worker for the one that has waited longest.
 *
 * Nothing depends on the queue being up to date.  Whoever takes a buffer from it
 * claims it, which fails if it is gone or has a worker; and what is missing in
 * it, the launcher finds in its next walk.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "queue.h"

/*
 * Set the queue: the first of the `nwaiting' buffers that wait, those that have
 * waited longest first.  While saved counts are being loaded (`loading'),
 * workers must make way even if it is empty.  For the launcher.  Takes
 * SharedControl.lock.
 */
void
queue_set(const QueueEntry *entries, int nentries, int nwaiting, bool loading)
{
	SharedQueue *queue = &shared_control->queue;

	Assert(nentries <= QUEUE_SIZE && nentries <= nwaiting);
	LWLockAcquire(&shared_control->lock, LW_EXCLUSIVE);
	if (nentries > 0)
		memcpy(queue->entries, entries, nentries * sizeof(QueueEntry));
	queue->nentries = nentries;
	queue->loading = loading;
	pg_atomic_write_u32(&queue->waiting, nwaiting + loading);
	LWLockRelease(&shared_control->lock);
}

/* Remove an entry.  The caller has SharedControl.lock. */
static void
remove_entry(SharedQueue *queue, int i)
{
	uint32		waiting = pg_atomic_read_u32(&queue->waiting);

	queue->nentries--;
	memmove(&queue->entries[i], &queue->entries[i + 1],
			(queue->nentries - i) * sizeof(QueueEntry));
	pg_atomic_write_u32(&queue->waiting, waiting - 1);
}

/*
 * Ask what a worker is to do that can do without its buffer for a while.  It
 * can serve the buffers of its database that belong to `owner'; none with
 * InvalidOid.
 *
 * If that is true of the one that has waited longest, it is given its key.  With
 * `may_overtake', it is otherwise given that of another one; then `overtakes' is
 * set.  With `may_leave', it is otherwise told to leave its slot to the one that
 * has waited longest.
 *
 * Whichever it is, that entry is removed, so that two workers do not make way
 * for one.  If the launcher had no room for all that wait, it is woken when half
 * of the queue is used up.  Takes SharedControl.lock.
 */
QueueAdvice
queue_ask(Oid owner, bool may_overtake, bool may_leave,
		  SharedBufferKey *key, bool *overtakes)
{
	SharedQueue *queue = &shared_control->queue;
	QueueAdvice advice = QUEUE_STAY;
	bool		refill;
	int			i;

	LWLockAcquire(&shared_control->lock, LW_EXCLUSIVE);
	for (i = 0; OidIsValid(owner) && i < queue->nentries &&
		 (i == 0 || may_overtake); i++)
	{
		const QueueEntry *entry = &queue->entries[i];

		if (entry->dboid != MyDatabaseId || entry->owner != owner)
			continue;
		key->dboid = entry->dboid;
		key->relid = entry->relid;
		*overtakes = i > 0;
		advice = QUEUE_TAKE;
		break;
	}
	if (advice == QUEUE_STAY && may_leave &&
		(queue->nentries > 0 || queue->loading))
	{
		advice = QUEUE_LEAVE;
		i = 0;
	}
	if (advice != QUEUE_STAY && queue->nentries > 0)
		remove_entry(queue, i);
	refill = queue->nentries < QUEUE_SIZE / 2 &&
		pg_atomic_read_u32(&queue->waiting) > queue->nentries + queue->loading;
	LWLockRelease(&shared_control->lock);

	if (refill)
		launcher_slot_wake();
	return advice;
}
