/*-------------------------------------------------------------------------
 *
 * publish.c
 *	  Publishing what a transaction has counted, when it commits.
 *
 * PRE_COMMIT	publish_prepare() finds or makes the shared counter of each key,
 *				and pins it; whatever can fail, fails here, and until it has
 *				returned the transaction can be cancelled
 * COMMIT		publish_commit() adds the counts through the pins; nothing can
 *				fail, and nobody can stop it
 * ABORT		publish_abort() releases the pins, if there are any
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "durable.h"
#include "launch.h"
#include "miscadmin.h"
#include "pending_internal.h"
#include "savefile.h"
#include "utils/memutils.h"

/* from this many keys on, publish them in the order of their hashes */
#define SORT_MIN_KEYS		10000
#define HASH_RANGE_BITS		12
#define HASH_RANGES			(1 << HASH_RANGE_BITS)
#define HASH_RANGE(hash)	((hash) >> (32 - HASH_RANGE_BITS))

/*
 * How many keys ahead to prefetch.  Without that, cache misses would take as
 * long as all the rest.
 */
#define FETCH_AHEAD			8

/*
 * A key that is being published.  begin_key() sets all but `key' and the pin.
 *
 * Where there are many, visiting their PendingKeys, which lie in no order, takes
 * as long as all the rest.  So what is needed after the commit is here.
 */
typedef struct PublishedKey
{
	PendingKey *key;
	PendingBuffer *pending;		/* of its buffer */
	int64		delta;
	CounterPin	pin;
	dsa_pointer request;		/* to flush it, or InvalidDsaPointer */
} PublishedKey;

/* all keys of the transaction, and how many of them, from the start, are done */
static PublishedKey *published = NULL;
static uint64 npublished = 0;

/* allocate_body() has given its static memory away */
static bool first_body_used = false;

/*
 * List the keys in the order of the ranges of their hashes.
 *
 * A table of counters is divided by the same bits of the hash.  So keys that
 * follow each other have their counters, their neighbours in the table, and
 * the keys that move when the table grows close together in memory.  In any
 * other order, those of each key would be somewhere else.
 *
 * The drawback is that the first ranges fill up, and make the table grow,
 * before the others have anything.  So use this only for keys for which there
 * is room.
 */
static void
sort_by_ranges(PendingSet *set, PublishedKey *keys)
{
	uint64		first[HASH_RANGES + 1] = {0};

	for (PendingKey *key = set->keys; key != NULL; key = key->next)
	{
		CHECK_FOR_INTERRUPTS();
		first[HASH_RANGE(key->hash) + 1]++;
	}
	for (int i = 0; i < HASH_RANGES; i++)
		first[i + 1] += first[i];
	for (PendingKey *key = set->keys; key != NULL; key = key->next)
	{
		CHECK_FOR_INTERRUPTS();
		keys[first[HASH_RANGE(key->hash)]++].key = key;
	}
}

/*
 * Are there so many keys that their order matters, and is there room for all of
 * them?
 */
static bool
is_to_be_sorted(PendingSet *set)
{
	int			least = 0;

	if (set->nkeys < SORT_MIN_KEYS)
		return false;

	/* a session that has not counted before does not know what is in use */
	registry_attach(true);
	for (PendingBuffer *pending = set->buffers; pending;
		 pending = pending->next)
	{
		int			bound = pending->buffer->options.max_memory;

		if (bound > 0 && (least == 0 || bound < least))
			least = bound;
	}
	return table_has_room(set->nkeys, set->size, (uint64) least * 1024);
}

/*
 * List the keys; none is done yet.  Returns whether they are in the order of
 * the ranges of their hashes.
 */
static bool
list_keys(PendingSet *set)
{
	static PublishedKey few[LIST_SEARCH_MAX];
	PublishedKey *keys = few;
	bool		sorted = is_to_be_sorted(set);

	if (set->nkeys > LIST_SEARCH_MAX)
		keys = pending_allocate_many(set->nkeys * sizeof(PublishedKey));
	if (sorted)
		sort_by_ranges(set, keys);
	else
	{
		PublishedKey *next = keys;

		for (PendingKey *key = set->keys; key != NULL; key = key->next)
		{
			CHECK_FOR_INTERRUPTS();
			(next++)->key = key;
		}
	}
	published = keys;
	npublished = 0;
	return sorted;
}

/*
 * For TRUNCATE: pin every counter of a buffer.  Returns whether the buffer has
 * a shared part.
 */
static bool
pin_truncated(PendingBuffer *pending)
{
	SbBuffer   *buffer = pending->buffer;
	MemoryContext oldcontext;

	/* saved counts may still be loaded, so wait for them before looking */
	if (!launch_await_load(buffer->relid, LAUNCH_ALL_KEYS))
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("cannot truncate buffer \"%s\" now",
						NameStr(buffer->name)),
				 errdetail("Counts that were saved when the server was stopped are still being loaded."),
				 errhint("Try again when file \"%s\" no longer exists in the data directory. If memory is short, increase \"%s\", or drop the buffer.",
						 SAVED_LOADING_FILE, "statbuffer.max_memory")));
	if (!buffer_look_up(buffer))
		return false;
	pending->shared = buffer->shared;
	oldcontext = MemoryContextSwitchTo(TopTransactionContext);
	counters_pin_all(&buffer->table, &pending->truncate_pins,
					 &pending->ntruncate_pins);
	MemoryContextSwitchTo(oldcontext);
	return true;
}

/*
 * Begin to publish a key.  Returns whether its counter must be pinned: whether
 * there is anything to add.
 */
static inline bool
begin_key(PublishedKey *entry)
{
	PendingKey *key = entry->key;
	SbBuffer   *buffer = pending_key_buffer(key);
	PendingBuffer *pending = buffer->pending;

	CHECK_FOR_INTERRUPTS();
	entry->pending = pending;
	entry->delta = key->delta;
	entry->pin.ref.counter = NULL;
	entry->request = InvalidDsaPointer;
	if (key->nincrements == 0 || pending->dropped)
		return false;
	buffer_check_shape(buffer, key->shape);
	if (!pending->attached)
	{
		if (unlikely(!buffer_is_attached(buffer)))
			buffer_attach(buffer, true);
		pending->shared = buffer->shared;
		pending->attached = true;
	}
	pending->sum += (uint64) key->delta;
	pending->nincrements += key->nincrements;
	return key->delta != 0;
}

static inline KeyBytes
key_bytes(const PendingKey *key)
{
	KeyBytes	bytes = {key->data, key->len, key->hash};

	return bytes;
}

/*
 * Pin the counter of a key.  Returns whether it was pinned.  If there is no
 * room for it, that is an error, or its count is to be discarded.
 */
static bool
pin_key(PublishedKey *entry)
{
	PendingKey *key = entry->key;
	SbBuffer   *buffer = pending_key_buffer(key);
	PendingBuffer *pending = buffer->pending;
	KeyBytes	bytes = key_bytes(key);
	TableResult result;

	result = counters_pin(pending->shared, &buffer->table, &bytes, key->delta,
						  &entry->pin);
	if (unlikely(entry->pin.ref.counter == NULL))
	{
		if (!buffer->options.discard)
			table_report_full(result, NameStr(buffer->name));
		pending->discarded += (uint64) key->delta;
		pending->ndiscarded++;
		pending->full = result;
		return false;
	}
	return true;
}

/*
 * Keys that follow each other and have a buffer and a table_group() in common:
 * their counters are pinned together.
 */
typedef struct PublishedGroup
{
	const SbBuffer *buffer;		/* NULL: none yet */
	int			number;			/* of the group */
	uint64		nkeys;			/* how many of it have come by */
	int			n;				/* how many of them are in `keys' */
	KeyBytes	keys[HASH_MANY];
	PublishedKey *entries[HASH_MANY];
} PublishedGroup;

/*
 * Pin the counters of the keys that are gathered in a group.  Returns whether
 * any was pinned.
 */
static bool
pin_group(PublishedGroup *group, uint64 nkeys)
{
	CounterPin *pins[HASH_MANY];
	uint64		expected = nkeys / TABLE_GROUPS;
	bool		pinned = false;

	if (group->n == 0)
		return false;
	for (int i = 0; i < group->n; i++)
		pins[i] = &group->entries[i]->pin;
	counters_pin_many(group->entries[0]->pending->shared, &group->buffer->table,
					  group->keys, pins, group->n,
					  expected - Min(group->nkeys, expected));
	for (int i = 0; i < group->n; i++)
	{
		if (unlikely(pins[i]->ref.counter == NULL) &&
			!pin_key(group->entries[i]))
			continue;
		pinned = true;
	}
	group->n = 0;
	return pinned;
}

/*
 * Begin to publish the keys, and pin their counters.  They are in the order of
 * the ranges of their hashes.  Returns whether any was pinned.
 */
static bool
pin_sorted(PendingSet *set)
{
	PublishedGroup group = {0};
	bool		pinned = false;

	for (uint64 i = 0; i < set->nkeys; i++)
	{
		PublishedKey *entry = &published[i];
		PendingKey *key = entry->key;
		const SbBuffer *buffer = pending_key_buffer(key);
		bool		any;

		if (i + FETCH_AHEAD < set->nkeys)
			compat_prefetch(published[i + FETCH_AHEAD].key);
		any = begin_key(entry);
		npublished = i + 1;
		if (!any)
			continue;
		if (!count_is_within(key->delta, MODERATE_DELTA))
		{
			pinned |= pin_key(entry);
			continue;
		}
		if (group.n == HASH_MANY || group.buffer != buffer ||
			group.number != table_group(key->hash))
		{
			pinned |= pin_group(&group, set->nkeys);
			if (group.buffer != buffer || group.number != table_group(key->hash))
			{
				group.buffer = buffer;
				group.number = table_group(key->hash);
				group.nkeys = 0;
			}
		}
		group.keys[group.n] = key_bytes(key);
		group.entries[group.n++] = entry;
		group.nkeys++;
	}
	pinned |= pin_group(&group, set->nkeys);
	return pinned;
}

/* The same for few keys, or in any order. */
static bool
pin_unsorted(PendingSet *set)
{
	bool		pinned = false;

	for (uint64 i = 0; i < set->nkeys; i++)
	{
		bool		any;

		if (i + FETCH_AHEAD < set->nkeys)
			compat_prefetch(published[i + FETCH_AHEAD].key);
		any = begin_key(&published[i]);
		npublished = i + 1;
		if (any)
			pinned |= pin_key(&published[i]);
	}
	return pinned;
}

/*
 * Warn that the counts of new keys are discarded.  The user is told each time,
 * the log once in a while, because every transaction may have such keys.
 */
void
publish_warn_full(SbBuffer *buffer, SharedBuffer *shared, TableResult result,
				  uint64 nkeys)
{
	table_warn_full(registry_may_warn(shared) ? WARNING : WARNING_CLIENT_ONLY,
					result, NameStr(buffer->name), nkeys);
}

/*
 * Allocate the requests for keys that are to be flushed at once, because
 * memory cannot be allocated later.  If memory is out, request a flush of all
 * keys instead.
 */
static void
allocate_requests(void)
{
	for (uint64 i = 0; i < npublished; i++)
	{
		PendingBuffer *pending = published[i].pending;

		CHECK_FOR_INTERRUPTS();
		if (!published[i].key->flush || pending->flush_all ||
			published[i].pin.ref.counter == NULL)
			continue;
		published[i].request = requests_allocate_flush();
		if (DsaPointerIsValid(published[i].request))
			pending->has_requests = true;
		else
			pending->flush_all = true;
	}
}

/*
 * Get memory for a body, to the end of the transaction.  The first one, which
 * often is the only one, is in static memory: it takes a large part of a
 * context's first block, and so would have another one allocated.
 */
static LedgerBody *
allocate_body(void)
{
	static LedgerBody first;

	if (first_body_used)
		return MemoryContextAlloc(TopTransactionContext, sizeof(LedgerBody));
	first_body_used = true;
	return &first;
}

/*
 * Begin what a durable buffer appends to the ledger.  Returns whether it is
 * durable.
 */
static inline bool
begin_body(PendingBuffer *pending)
{
	SbBuffer   *buffer = pending->buffer;

	if (likely(!buffer->options.durable))
		return false;
	pending->body = allocate_body();
	ledger_begin_body(pending->body, durable_epoch(buffer, buffer->shape->keys));
	return true;
}

/* Append what was put into the bodies. */
static void
end_bodies(PendingSet *set, LedgerWriter *writer)
{
	for (PendingBuffer *pending = set->buffers; pending;
		 pending = pending->next)
		if (pending->body != NULL)
			ledger_end_body(writer, pending->body);
	ledger_close(writer);
}

/*
 * Append to the ledger what is published to durable buffers: what has found room
 * in memory.
 */
static void
append_published(PendingSet *set)
{
	LedgerWriter writer;

	ledger_open_current(&writer, false);
	for (uint64 i = 0; i < npublished; i++)
	{
		PublishedKey *entry = &published[i];

		CHECK_FOR_INTERRUPTS();
		if (entry->pending->body != NULL && entry->pin.ref.counter != NULL)
			ledger_put(&writer, entry->pending->body, entry->key->data,
					   entry->key->len, entry->delta);
	}
	end_bodies(set, &writer);
}

/*
 * Before PREPARE TRANSACTION: append what was counted in durable buffers to the
 * table from which it is counted when the transaction has committed.  Raises an
 * error if something was counted in others.
 */
void
publish_append_prepared(PendingSet *set)
{
	LedgerWriter writer;
	bool		open = false;

	for (PendingKey *key = set->keys; key != NULL; key = key->next)
	{
		SbBuffer   *buffer = pending_key_buffer(key);

		CHECK_FOR_INTERRUPTS();
		if (key->nincrements == 0 || !buffer_revalidate(buffer))
			continue;
		if (!buffer->options.durable)
			ereport(ERROR,
					(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
					 errmsg("cannot PREPARE a transaction that has incremented buffer \"%s\"",
							NameStr(buffer->name)),
					 errdetail("The buffer is not durable."),
					 errhint("Set its option \"%s\", or use sb_async_increment(), which does not depend on the transaction.",
							 "durable")));
		buffer_check_shape(buffer, key->shape);
		if (key->delta == 0)
			continue;
		if (!open)
			ledger_open_prepared(&writer);
		open = true;
		if (buffer->pending->body == NULL)
			(void) begin_body(buffer->pending);
		ledger_put(&writer, buffer->pending->body, key->data, key->len,
				   key->delta);
	}
	if (!open)
		return;
	end_bodies(set, &writer);

	/* so that nothing can fail when it is prepared */
	(void) ledger_database(MyDatabaseId, true);
	launch_ensure();
}

/*
 * The transaction is prepared: have the keeper look when it commits.  Takes no
 * lock, cannot fail.
 */
void
publish_prepared(PendingSet *set)
{
	for (PendingBuffer *pending = set->buffers; pending;
		 pending = pending->next)
		if (pending->body != NULL)
		{
			ledger_want(LEDGER_SWEEP);
			return;
		}
}

/*
 * Do everything that can fail: pin the counter of each key.  Raises an error
 * if one cannot be pinned, if the transaction is cancelled, or if the server is
 * stopping.
 */
void
publish_prepare(PendingSet *set)
{
	bool		any = false;
	bool		pinned = false;
	bool		durable = false;

	for (PendingBuffer *pending = set->buffers; pending;
		 pending = pending->next)
	{
		/* the subtransactions that used it were all rolled back */
		if (!pending->locked && !pending->truncated)
			continue;
		pending->dropped = !pending->buffer->valid &&
			!buffer_revalidate(pending->buffer);
		if (pending->dropped)
			continue;
		if (pending->truncated && pending->buffer->options.durable)
		{
			durable_truncate(pending->buffer);
			(void) buffer_revalidate(pending->buffer);
		}
		if (pending->locked)
			durable |= begin_body(pending);
		if (pending->truncated)
			pinned |= pin_truncated(pending);
	}

	pinned |= list_keys(set) ? pin_sorted(set) : pin_unsorted(set);
	if (pinned)
		counters_check_open();
	if (unlikely(durable) && pinned)
		append_published(set);
	if (set->flush_requested)
		allocate_requests();
	for (PendingBuffer *pending = set->buffers; pending;
		 pending = pending->next)
		any |= pending->attached;
	if (!any)
		return;
	launch_ensure();

	/* the commit is too late: nothing may fail there */
	for (PendingBuffer *pending = set->buffers; pending;
		 pending = pending->next)
		if (unlikely(pending->ndiscarded > 0))
			publish_warn_full(pending->buffer, pending->shared, pending->full,
							  pending->ndiscarded);
}

/*
 * The transaction has committed: add the counts.  Takes no lock, cannot fail.
 */
void
publish_commit(PendingSet *set)
{
	ClockTime	now = 0;

	for (PendingBuffer *pending = set->buffers; pending;
		 pending = pending->next)
	{
		SharedBuffer *shared = pending->shared;

		for (int i = 0; i < pending->ntruncate_pins; i++)
			counters_clear(shared, &pending->truncate_pins[i]);
		if (pending->ntruncate_pins > 0)
			registry_ask(shared, REQUEST_SORT_AGAIN);

		/* before the keys: the sums must never show less than was stored */
		if (pending->attached)
		{
			registry_set_committed(shared);
			registry_count(shared, STAT_PUBLISHED, pending->sum);
			if (unlikely(pending->ndiscarded > 0))
				registry_count(shared, STAT_DISCARDED, pending->discarded);
			registry_count(shared, STAT_INCREMENTS, pending->nincrements);
		}
	}

	for (uint64 i = 0; i < npublished; i++)
	{
		int64		delta = published[i].delta;
		SharedBuffer *shared;
		CounterRef	ref;

		if (published[i].pin.ref.counter == NULL)
			continue;
		shared = published[i].pending->shared;
		if (likely(!DsaPointerIsValid(published[i].request)))
		{
			counters_add(shared, &published[i].pin, delta, &now);
			continue;
		}

		/* the request needs its own pin, and must follow the scheduling */
		ref = published[i].pin.ref;
		counter_pin(ref.counter);
		counters_add(shared, &published[i].pin, delta, &now);
		requests_flush_published(&shared->requests, published[i].request, ref);
	}

	/* wake the workers when everything to be flushed is in place */
	for (PendingBuffer *pending = set->buffers; pending && set->flush_requested;
		 pending = pending->next)
	{
		if (!pending->attached ||
			(!pending->flush_all && !pending->has_requests))
			continue;
		if (pending->flush_all)
			requests_ask(&pending->shared->requests, REQUEST_FLUSH_ALL);
		registry_wake(pending->shared);
	}
}

/*
 * The transaction has rolled back: release any pins.  Takes no lock, cannot
 * fail.  Since the memory of requests cannot be freed here, hand them to the
 * worker, which frees them; the flush is harmless.
 */
void
publish_abort(PendingSet *set)
{
	for (PendingBuffer *pending = set->buffers; pending;
		 pending = pending->next)
	{
		for (int i = 0; i < pending->ntruncate_pins; i++)
			counters_unpin(pending->shared, &pending->truncate_pins[i]);
	}

	for (uint64 i = 0; i < npublished; i++)
	{
		SharedBuffer *shared = published[i].pending->shared;

		if (DsaPointerIsValid(published[i].request))
		{
			counter_pin(published[i].pin.ref.counter);
			requests_flush_published(&shared->requests, published[i].request,
									 published[i].pin.ref);
			registry_wake(shared);
		}
		counters_unpin(shared, &published[i].pin);
	}
}

/* Forget everything at the end of the transaction. */
void
publish_forget(void)
{
	published = NULL;
	npublished = 0;
	first_body_used = false;
}
