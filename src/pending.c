/*-------------------------------------------------------------------------
 *
 * pending.c
 *	  What the current transaction has counted, until it commits.
 *
 * An increment only adds to an entry in local memory.  The entries follow
 * the subtransactions.  When the transaction commits they are published: see
 * publish.c.
 *
 * Opening a buffer to count in it takes RowExclusiveLock on the relation, as
 * INSERT does, to the end of the transaction.  So the definition that was
 * valid when something was counted is still valid when it is published, unless
 * the transaction itself has changed it.
 *
 * What can fail at PRE_COMMIT must fail before other libraries do things there
 * that cannot be undone: postgres_fdw commits its remote transactions.  See
 * pending_come_first().
 *
 * When a subtransaction changes an entry, its previous state is pushed on an
 * undo stack, once for each nesting level.  The records of a level are those
 * above the last one of its parent's, so that a level is merged into its parent
 * by forgetting where it began.  That matters when a transaction commits with
 * thousands of savepoints that nobody has released.
 *
 * The entries are in TopTransactionContext and vanish with it.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "common/int.h"
#include "durable.h"
#include "launch.h"
#include "miscadmin.h"
#include "pending_internal.h"
#include "utils/acl.h"
#include "utils/memutils.h"

/* blocks from which keys are allocated once there are many */
#define BLOCK_MIN_SIZE		((Size) 8 * 1024)
#define BLOCK_MAX_SIZE		((Size) 8 * 1024 * 1024)
#define CACHE_LINE			64

/*
 * The maximum number of callbacks that a transaction registers in front of
 * those of other libraries, not counting the one for COMMIT: see
 * pending_come_first().
 */
#define FRONT_MAX			32

/*
 * The state of a key or a buffer before a subtransaction changed it.
 *
 * Records of keys have serial numbers, so that it is quickly found whether a
 * key has one of the current level.  The number is the record's place on the
 * stack plus `undo_base'.  Records that were discarded have numbers below
 * undo_base.
 */
typedef struct PendingUndo
{
	PendingKey *key;			/* or NULL: a buffer's */
	union
	{
		struct
		{
			int64		delta;
			uint64		nincrements;
			uint64		undo:PENDING_UNDO_BITS,
						flush:1;
		}			key;
		struct
		{
			PendingBuffer *pending;
			bool		locked;
			bool		truncated;
			bool		flush_all;
		}			buffer;
	}			was;
} PendingUndo;

/* An open subtransaction with undo records. */
typedef struct UndoLevel
{
	int			level;			/* nesting level, at least 2 */
	size_t		first;			/* its first record's place on the stack */
} UndoLevel;

typedef struct KeyHashEntry
{
	PendingKey *key;
	uint32		hash;
	char		status;
} KeyHashEntry;

/*
 * A key that is searched for, or made.  Its stored form is in two parts, so
 * that a text need not be copied to get its header before it.
 */
typedef struct SearchedKey
{
	const SbBuffer *buffer;
	const BufferShape *shape;
	const char *rest;			/* the stored form from its second byte on */
	uint32		hash;
	uint16		len;			/* as in KeyBytes */
	char		first;			/* its first byte */
} SearchedKey;

/* a NULL PendingKey pointer stands for this key */
static SearchedKey searched;

/* Do the key's bytes have the same meaning under this shape? */
static inline bool
is_of_shape(const PendingKey *key, const BufferShape *shape)
{
	return likely(key->shape == shape) ||
		shape_equal(key->shape->keys, shape->keys);
}

static inline bool
is_searched(const PendingKey *key)
{
	return pending_key_buffer(key) == searched.buffer &&
		key->len == searched.len &&
		key->data[0] == searched.first &&
		memcmp(key->data + 1, searched.rest, KEY_LENGTH(key->len) - 1) == 0 &&
		is_of_shape(key, searched.shape);
}

static inline uint32
hash_pending(const SbBuffer *buffer, uint32 hash)
{
	return hash ^ (uint32) buffer->relid;
}

/*
 * A NULL `b' stands for the key searched for.  No two entries are equal,
 * because keys are only inserted after a failed lookup.
 */
static inline bool
same_key(const PendingKey *a, const PendingKey *b)
{
	return b == NULL && is_searched(a);
}

#define SH_PREFIX keyhash
#define SH_ELEMENT_TYPE KeyHashEntry
#define SH_KEY_TYPE PendingKey *
#define SH_KEY key
#define SH_HASH_KEY(tb, k) hash_pending(pending_key_buffer(k), (k)->hash)
#define SH_EQUAL(tb, a, b) same_key(a, b)
#define SH_STORE_HASH
#define SH_GET_HASH(tb, a) (a)->hash
#define SH_USE_NONDEFAULT_ALLOCATOR
#define SH_SCOPE static inline
#define SH_DECLARE
#define SH_DEFINE
#include "lib/simplehash.h"

static inline void *
keyhash_allocate(keyhash_hash *hash, Size size)
{
	return memset(pending_allocate_many(size), 0, size);
}

static inline void
keyhash_free(keyhash_hash *hash, void *pointer)
{
	pfree(pointer);
}

/* what the transaction has counted */
static PendingSet counted;

/*
 * Used once there are LIST_SEARCH_MAX keys.  While a key is inserted, it is
 * `broken_hash', because memory may run out; see insert_hashed().
 */
static keyhash_hash *pending_hash = NULL;
static keyhash_hash *broken_hash = NULL;
static char *block_next = NULL;
static Size block_left = 0;
static Size block_size = 0;

static PendingUndo *undo_stack = NULL;
static size_t nundo = 0;
static size_t undo_size = 0;
static uint64 undo_base = 1;
static UndoLevel *undo_levels = NULL;	/* innermost last */
static size_t nundo_levels = 0;
static size_t undo_levels_size = 0;
static bool undo_merged = false;	/* some key may have two of one level */

/* number of callbacks registered by pending_come_first() */
static int	nfront = 0;

/* publish_prepare() was called, so nothing more can be counted */
static bool closed = false;

static void xact_callback(XactEvent event, void *arg);
static void front_callback(XactEvent event, void *arg);
static void subxact_callback(SubXactEvent event, SubTransactionId subid,
							 SubTransactionId parent_subid, void *arg);

/* Set up this room.  Called once, when the module is loaded. */
void
pending_init(void)
{
	RegisterXactCallback(xact_callback, NULL);
	RegisterSubXactCallback(subxact_callback, NULL);
}

/*
 * If the transaction has counted anything, ensure that the part of publishing
 * that can fail runs before the commit callbacks of other libraries.
 *
 * Callbacks are called in the reverse order of their registration.  That of
 * pending_init() may have been registered before those of other libraries, so
 * we register another one when a transaction first counts.  A library may
 * still register one after that, as postgres_fdw does when a session first
 * connects to another server.  Therefore this must be called again after any
 * statement that may have caused that, and when the transaction is about to
 * commit (`committing').  A library does so only once in a session, so after
 * FRONT_MAX such statements, a transaction need not repeat this before it
 * commits.
 *
 * Only forget_all() unregisters the callbacks.  Counting may happen within
 * another library's callback, and while the server walks the list, the items
 * that it is going to visit must stay.
 */
void
pending_come_first(bool committing)
{
	if (counted.buffers == NULL || closed ||
		nfront >= FRONT_MAX + (committing ? 1 : 0))
		return;
	RegisterXactCallback(front_callback, NULL);
	nfront++;
}

/* Has the transaction counted, or truncated a buffer? */
bool
pending_any(void)
{
	return counted.buffers != NULL;
}

/* ------------------------------------------------------------------------
 * Undo records
 * ------------------------------------------------------------------------
 */

/* Subtransactions below a nesting level have ended and were not undone. */
static void
merge_levels(int level)
{
	if (level == 1)
	{
		/* there is nothing that could be undone alone */
		undo_base += nundo;
		nundo = 0;
		nundo_levels = 0;
		undo_merged = false;
		return;
	}
	while (nundo_levels > 0 && undo_levels[nundo_levels - 1].level > level)
	{
		UndoLevel  *last = &undo_levels[nundo_levels - 1];

		if (nundo_levels > 1 && last[-1].level >= level)
		{
			nundo_levels--;
			undo_merged = true;
		}
		else
			last->level = level;
	}
}

/*
 * A level that others were merged into may have more than one record of a key.
 * Discard those that follow the first one, or the stack would grow with each
 * subtransaction that an outer one makes.
 */
static void
compact_undo(void)
{
	size_t		from = 0;
	size_t		to = 0;

	for (size_t n = 0; n < nundo_levels; n++)
	{
		size_t		end = n + 1 < nundo_levels ? undo_levels[n + 1].first : nundo;
		size_t		first = to;

		for (; from < end; from++)
		{
			PendingUndo *undo = &undo_stack[from];
			PendingKey *key = undo->key;

			if (key != NULL)
			{
				/*
				 * A key's records are found from the first one on, so
				 * key->undo is the new number of the one before.
				 */
				if (undo->was.key.undo >= undo_base)
				{
					if (key->undo >= undo_base + first)
						continue;
					undo->was.key.undo = key->undo;
				}
				key->undo = undo_base + to;
			}
			undo_stack[to++] = *undo;
		}
		undo_levels[n].first = first;
	}
	nundo = to;
	undo_merged = false;
}

/*
 * Enlarge an array of the transaction.  Returns it; on error the old one
 * stays.
 */
static void *
enlarge(void *array, size_t *nelements, size_t size)
{
	size_t		more = Max(*nelements * 2, 64);

	if (array == NULL)
		array = MemoryContextAlloc(TopTransactionContext, more * size);
	else
		array = repalloc_huge(array, more * size);
	*nelements = more;
	return array;
}

/* Push a record for the subtransaction at a nesting level. */
static PendingUndo *
push_undo(int level)
{
	/* another library may have counted at the end of a subtransaction */
	merge_levels(level);

	/* after this, half of the stack is free, so it costs little a record */
	if (nundo == undo_size)
	{
		if (undo_merged)
			compact_undo();
		if (nundo >= undo_size / 2)
			undo_stack = enlarge(undo_stack, &undo_size, sizeof(PendingUndo));
	}
	if (nundo_levels == 0 || undo_levels[nundo_levels - 1].level < level)
	{
		if (nundo_levels == undo_levels_size)
			undo_levels = enlarge(undo_levels, &undo_levels_size,
								  sizeof(UndoLevel));
		undo_levels[nundo_levels].level = level;
		undo_levels[nundo_levels].first = nundo;
		nundo_levels++;
	}
	return &undo_stack[nundo++];
}

static pg_noinline void
push_key(PendingKey *key, int level)
{
	PendingUndo *undo = push_undo(level);

	undo->key = key;
	undo->was.key.delta = key->delta;
	undo->was.key.nincrements = key->nincrements;
	undo->was.key.undo = key->undo;
	undo->was.key.flush = key->flush;
	Assert(undo_base + nundo < UINT64CONST(1) << PENDING_UNDO_BITS);
	key->undo = undo_base + (undo - undo_stack);
}

/*
 * Save a key's state before the current subtransaction changes it, unless that
 * has been done.  The outermost level needs no records.
 */
static inline void
save_key(PendingKey *key)
{
	int			level = GetCurrentTransactionNestLevel();

	if (likely(level == 1))
		return;
	if (nundo_levels > 0)
	{
		UndoLevel  *last = &undo_levels[nundo_levels - 1];

		if (last->level == level && key->undo >= undo_base + last->first)
			return;
	}
	push_key(key, level);
}

/*
 * Likewise for a buffer, each time that something of it becomes true, which it
 * stays if it is not undone.
 */
static void
save_buffer(PendingBuffer *pending)
{
	int			level = GetCurrentTransactionNestLevel();
	PendingUndo *undo;

	if (level == 1)
		return;
	undo = push_undo(level);
	undo->key = NULL;
	undo->was.buffer.pending = pending;
	undo->was.buffer.locked = pending->locked;
	undo->was.buffer.truncated = pending->truncated;
	undo->was.buffer.flush_all = pending->flush_all;
}

/* Undo what the subtransaction at a nesting level has changed. */
static void
undo_level(int level)
{
	size_t		first = nundo;

	while (nundo_levels > 0 && undo_levels[nundo_levels - 1].level >= level)
		first = undo_levels[--nundo_levels].first;
	while (nundo > first)
	{
		PendingUndo *undo = &undo_stack[--nundo];

		if (undo->key != NULL)
		{
			undo->key->delta = undo->was.key.delta;
			undo->key->nincrements = undo->was.key.nincrements;
			undo->key->undo = undo->was.key.undo;
			undo->key->flush = undo->was.key.flush;
		}
		else
		{
			PendingBuffer *pending = undo->was.buffer.pending;

			pending->locked = undo->was.buffer.locked;
			pending->truncated = undo->was.buffer.truncated;
			pending->flush_all = undo->was.buffer.flush_all;
		}
	}
}

/* ------------------------------------------------------------------------
 * Counting
 * ------------------------------------------------------------------------
 */

/*
 * Raise an error because another library's commit callback counts after
 * publish_prepare(): it would be left out.
 */
static void
report_closed(SbBuffer *buffer)
{
	ereport(ERROR,
			(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
			 errmsg("cannot change buffer \"%s\" while the transaction commits",
					NameStr(buffer->name)),
			 errhint("Use sb_async_increment(), which does not depend on the transaction.")));
}

static PendingBuffer *
get_pending_buffer(SbBuffer *buffer)
{
	PendingBuffer *pending = buffer->pending;

	if (pending == NULL)
	{
		if (buffer->pending_space == NULL)
			buffer->pending_space = MemoryContextAlloc(TopMemoryContext,
													   sizeof(PendingBuffer));
		pending = buffer->pending_space;
		memset(pending, 0, sizeof(PendingBuffer));
		pending->buffer = buffer;
		pending->next = counted.buffers;
		counted.buffers = pending;
		buffer->pending = pending;
	}
	return pending;
}

/*
 * Open a buffer for counting.  All callers that count must use this.  Takes
 * RowExclusiveLock on the buffer to the end of the transaction.
 *
 * With `check_privilege', the current user must have the INSERT privilege at
 * this moment.  Without, the executor has checked that.
 *
 * Raises the errors of buffer_open_to_count(); then the target is not open.
 */
void
pending_open(PendingTarget *target, Oid relid, bool check_privilege)
{
	uint64		generation = buffer_generation;
	PendingBuffer *pending;
	SbBuffer   *buffer;

	target->buffer = NULL;
	target->last = NULL;
	target->userid = GetUserId();
	buffer = buffer_open_to_count(relid, check_privilege);
	pending = get_pending_buffer(buffer);
	if (!pending->locked)
	{
		save_buffer(pending);
		pending->locked = true;
	}
	if (buffer->shared == NULL)
		(void) buffer_look_up(buffer);
	target->buffer = buffer;
	target->generation = generation;
}

/*
 * Insert a key into the hash table.  If memory is out when the table must
 * grow, simplehash leaves it with the size that it was to have, which only
 * allows to destroy it.  So it is not in use until that has succeeded.
 */
static void
insert_hashed(PendingKey *key)
{
	keyhash_hash *hash = pending_hash;
	bool		found;

	broken_hash = hash;
	pending_hash = NULL;
	keyhash_insert(hash, key, &found);
	pending_hash = hash;
	broken_hash = NULL;
}

/* Make the hash table, or make it again after insert_hashed() has failed. */
static void
make_hash(void)
{
	uint64		size = counted.nkeys + counted.nkeys / 4;

	if (broken_hash != NULL)
	{
		keyhash_hash *hash = broken_hash;

		broken_hash = NULL;
		keyhash_destroy(hash);
	}
	pending_hash = keyhash_create(TopTransactionContext,
								  Min(Max(size, 4 * LIST_SEARCH_MAX),
									  PG_UINT32_MAX), NULL);
	for (PendingKey *key = counted.keys; key != NULL; key = key->next)
		insert_hashed(key);
}

/* Prepare for find_searched() and make_searched(). */
static inline void
set_searched(const SbBuffer *buffer, const BufferShape *shape,
			 const KeyBytes *bytes)
{
	/* every stored form has a byte at least: see key_form() */
	Assert(KEY_LENGTH(bytes->len) > 0);
	searched.buffer = buffer;
	searched.shape = shape;
	searched.first = bytes->data[0];
	searched.rest = bytes->data + 1;
	searched.len = bytes->len;
	searched.hash = bytes->hash;
}

/* Find the key searched for, or NULL. */
static pg_attribute_always_inline PendingKey *
find_searched(void)
{
	if (pending_hash == NULL && unlikely(counted.nkeys > LIST_SEARCH_MAX))
		make_hash();
	if (pending_hash != NULL)
	{
		KeyHashEntry *entry;

		entry = keyhash_lookup_hash(pending_hash, NULL,
									hash_pending(searched.buffer,
												 searched.hash));
		return entry ? entry->key : NULL;
	}
	for (PendingKey *key = counted.keys; key != NULL; key = key->next)
		if (is_searched(key))
			return key;
	return NULL;
}

/* Allocate one of many keys, from blocks of increasing size. */
static PendingKey *
allocate_key(Size size)
{
	size = TYPEALIGN(CACHE_LINE, size);
	if (size > block_left)
	{
		char	   *block;
		Size		next_size;

		next_size = Min(Max(2 * block_size, BLOCK_MIN_SIZE), BLOCK_MAX_SIZE);
		block = pending_allocate_many(next_size + CACHE_LINE);
		block_next = (char *) TYPEALIGN(CACHE_LINE, block);
		block_left = block_size = next_size;
	}
	block_next += size;
	block_left -= size;
	return (PendingKey *) (block_next - size);
}

/*
 * Allocate a key.  The first of a transaction, which often is the only one, is
 * in static memory if it is short.
 */
static inline PendingKey *
allocate_few(Size size)
{
	static union
	{
		PendingKey	key;
		char		space[offsetof(PendingKey, data) + 64];
	}			first;

	if (counted.keys == NULL && size <= sizeof(first))
		return &first.key;
	return MemoryContextAlloc(TopTransactionContext, size);
}

/* Make the key searched for. */
static PendingKey *
make_searched(void)
{
	Size		len = KEY_LENGTH(searched.len);
	Size		size = offsetof(PendingKey, data) + len;
	PendingKey *key;

	if (counted.nkeys >= LIST_SEARCH_MAX && pending_hash == NULL)
		make_hash();

	key = pending_hash ? allocate_key(size) : allocate_few(size);
	key->shape = searched.shape;
	key->hash = searched.hash;
	key->len = searched.len;
	key->data[0] = searched.first;
	memcpy(key->data + 1, searched.rest, len - 1);
	key->delta = 0;
	key->nincrements = 0;
	key->flush = 0;
	key->undo = 0;
	key->scanned = false;

	if (pending_hash != NULL)
		insert_hashed(key);
	if (counted.keys == NULL)
		pending_come_first(false);
	key->next = counted.keys;
	counted.keys = key;
	counted.nkeys++;
	counted.size += len;
	return key;
}

/*
 * Raise an error if the user may not add more than MODERATE_DELTA to a key.
 *
 * Whether such an increment fits depends on the present count, which success
 * or failure would reveal.  So it also requires the SELECT privilege: for the
 * user who counts, and if that happens through a view, for the view's owner
 * too.
 */
static pg_noinline void
check_large(SbBuffer *buffer, Oid userid)
{
	if (pg_class_aclcheck(buffer->relid, userid, ACL_SELECT) == ACLCHECK_OK &&
		(userid == GetUserId() ||
		 pg_class_aclcheck(buffer->relid, GetUserId(), ACL_SELECT) == ACLCHECK_OK))
		return;
	ereport(ERROR,
			(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
			 errmsg("permission denied to increment a key of buffer \"%s\" by more than " INT64_FORMAT " in one transaction",
					NameStr(buffer->name), MODERATE_DELTA),
			 errdetail("Whether so large a count fits depends on what the key has, which takes the SELECT privilege to know."),
			 errhint("Grant SELECT on the buffer, or count in a larger unit.")));
}

static pg_noinline void
report_overflow(const PendingKey *key, int64 count)
{
	ereport(ERROR,
			(errcode(ERRCODE_NUMERIC_VALUE_OUT_OF_RANGE),
			 errmsg("count out of range for type bigint"),
			 errdetail("The transaction has added " INT64_FORMAT " to the key, and " INT64_FORMAT " was to be added.",
					   key->delta, count)));
}

/* Add to a key.  Returns the sum of what the transaction has added to it. */
static inline int64
add(PendingKey *key, int64 count, Oid userid)
{
	int64		delta;

	if (unlikely(pg_add_s64_overflow(key->delta, count, &delta)))
		report_overflow(key, count);
	if (unlikely(!count_is_within(delta, MODERATE_DELTA)))
		check_large(pending_key_buffer(key), userid);
	save_key(key);
	key->delta = delta;
	key->nincrements++;
	return delta;
}

/*
 * Add to the key that pending_add() has left in the target, if
 * buffer_generation has not changed since.  Returns what pending_add() does.
 *
 * Raises an error if the sum leaves bigint's range, or is more than the user
 * may add.
 */
int64
pending_add_again(const PendingTarget *target, int64 count)
{
	return add(target->last, count, target->userid);
}

/*
 * The stored form of the key that pending_add() has left in a target, under the
 * same condition as pending_add_again().
 */
const char *
pending_key_data(const PendingKey *key)
{
	return key->data;
}

/*
 * There seems to be no room for the key searched for.  Raise an error if the
 * commit would now, so that the user can catch it.
 */
static pg_noinline void
check_full(SbBuffer *buffer)
{
	TableResult result;
	KeySpace	space;
	KeyBytes	key = {space.data, searched.len, searched.hash};

	if (!buffer_revalidate(buffer))
		return;
	buffer_check_shape(buffer, searched.shape);
	buffer_attach(buffer, true);
	launch_ensure();
	space.data[0] = searched.first;
	memcpy(space.data + 1, searched.rest, KEY_LENGTH(searched.len) - 1);
	result = counters_probe(buffer->shared, &buffer->table, &key);
	if (table_is_full(result))
		table_report_full(result, NameStr(buffer->name));
}

/*
 * Raise an error if there is no room now for the key searched for, in which the
 * transaction has nothing yet.  What changes until the commit is seen there, and
 * so is how much room all keys of the transaction take together.
 *
 * Nothing is looked up unless memory is out.
 */
static inline void
check_room(void)
{
	SbBuffer   *buffer = unconstify(SbBuffer *, searched.buffer);
	SharedTable *table = buffer->shared ? &buffer->shared->table : NULL;
	uint64		max_memory = (uint64) buffer->options.max_memory * 1024;

	if (!buffer->options.discard &&
		unlikely(table_may_be_full(table, max_memory, searched.len)))
		check_full(buffer);
}

static inline int64
add_searched(PendingTarget *target, int64 count)
{
	PendingKey *key = find_searched();
	int64		sum;

	if ((key == NULL || key->delta == 0) && count != 0)
		check_room();
	if (key == NULL)
		key = make_searched();
	sum = add(key, count, target->userid);
	target->last = key;
	return sum;
}

/*
 * Add to a key of an open buffer, as part of the transaction.  `shape' is the
 * one under which the key was formed.  It may no longer be the buffer's; then
 * the transaction fails at commit.
 *
 * Returns the sum of what the transaction has added to the key, and leaves the
 * key in the target, for pending_add_again().  Raises the errors of
 * pending_add_again(), and an error if the transaction is already committing or
 * if memory is out, unless the buffer is to discard what finds no room.
 */
int64
pending_add(PendingTarget *target, const BufferShape *shape,
			const KeyBytes *bytes, int64 count)
{
	if (unlikely(closed))
		report_closed(target->buffer);
	set_searched(target->buffer, shape, bytes);
	return add_searched(target, count);
}

/*
 * Likewise, for a buffer whose key is one text, of which the stored form has a
 * short header.
 */
int64
pending_add_text(PendingTarget *target, const char *text, Size len,
				 int64 count)
{
	SbBuffer   *buffer = target->buffer;

	Assert(buffer->shape->is_text && len <= KEY_SHORT_TEXT);
	if (unlikely(closed))
		report_closed(buffer);
	searched.buffer = buffer;
	searched.shape = buffer->shape;
	searched.first = key_text_header(len);
	searched.rest = text;

	searched.len = len + VARHDRSZ_SHORT;
	searched.hash = key_hash_parts(searched.first, text, len);
	return add_searched(target, count);
}

/*
 * Raise an error if the transaction has made other epochs for a durable buffer,
 * or is going to: if it is rolled back, so are they.
 */
static void
check_durable(SbBuffer *buffer)
{
	if (durable_is_unsettled(buffer))
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("cannot increment buffer \"%s\" asynchronously in a transaction that has set its option \"%s\"",
						NameStr(buffer->name), "durable"),
				 errhint("Set the option in a transaction of its own.")));
	if (buffer->options.durable && buffer->pending->truncated)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("cannot increment buffer \"%s\" asynchronously in a transaction that has truncated it",
						NameStr(buffer->name)),
				 errdetail("The buffer is durable.")));
}

/*
 * Append an increment that is outside of the transaction to the ledger.  Before it
 * is added to the counter: a flush that takes it must come after it in WAL.
 * Releases the pin if that fails.
 */
static void
append_at_once(SbBuffer *buffer, const BufferShape *shape, const KeyBytes *key,
			   int64 count, CounterPin *pin)
{
	LedgerWriter writer;
	LedgerBody	body;

	PG_TRY();
	{
		ledger_begin_body(&body, durable_epoch(buffer, shape->keys));
		ledger_open_current(&writer, true);
		ledger_put(&writer, &body, key->data, key->len, count);
		ledger_end_body(&writer, &body);
		ledger_close(&writer);
	}
	PG_CATCH();
	{
		counters_unpin(buffer->shared, pin);
		PG_RE_THROW();
	}
	PG_END_TRY();
}

/*
 * Add to a key of an open buffer immediately, outside of the transaction.
 * `shape' is the one under which the key was formed.  Returns false if nothing
 * was added: it was discarded, or the buffer is gone.
 *
 * Raises an error if the user may not add that much, if the transaction has
 * altered the key columns, if the sum leaves bigint's range, if memory is out,
 * or if the server is stopping.  If memory is out and the buffer is to discard
 * what finds no room, warns once in the transaction.
 */
bool
pending_add_now(const PendingTarget *target, const BufferShape *shape,
				const KeyBytes *key, int64 count)
{
	SbBuffer   *buffer = target->buffer;
	SharedBuffer *shared;
	TableResult result = TABLE_FOUND;
	bool		full = false;

	if (!count_is_within(count, MODERATE_DELTA))
		check_large(buffer, target->userid);
	if (!buffer_revalidate(buffer))
		return false;
	buffer_check_shape(buffer, shape);
	buffer_check_settled(buffer);
	check_durable(buffer);
	buffer_attach(buffer, true);
	launch_ensure();
	shared = buffer->shared;
	if (count != 0)
	{
		CounterPin	pin;
		ClockTime	now = 0;
		bool		locked;

		result = counters_pin_now(shared, &buffer->table, key, count, &pin);
		full = pin.ref.counter == NULL;
		if (unlikely(full) && !buffer->options.discard)
			table_report_full(result, NameStr(buffer->name));
		locked = pin.locked;
		if (buffer->options.durable && !full)
			append_at_once(buffer, shape, key, count, &pin);
		if (likely(!full))
			counters_add(shared, &pin, count, &now);
		if (locked)
			counters_end_turn(shared);
	}
	registry_count(shared, STAT_PUBLISHED, (uint64) count);
	registry_count(shared, STAT_INCREMENTS, 1);
	if (unlikely(full))
	{
		registry_count(shared, STAT_DISCARDED, (uint64) count);
		if (!buffer->pending->warned)
		{
			buffer->pending->warned = true;
			publish_warn_full(buffer, shared, result, 1);
		}
	}
	return !full;
}

/*
 * Discard what the transaction has added to a buffer, and at commit everything
 * that the buffer holds.  The caller holds AccessExclusiveLock on the
 * relation.  Raises an error if the transaction is already committing.
 */
void
pending_truncate(SbBuffer *buffer)
{
	PendingBuffer *pending = get_pending_buffer(buffer);

	if (closed)
		report_closed(buffer);
	buffer_lock_for_transaction(buffer->relid, AccessExclusiveLock);
	pending_come_first(false);
	for (PendingKey *key = counted.keys; key != NULL; key = key->next)
	{
		CHECK_FOR_INTERRUPTS();
		if (pending_key_buffer(key) != buffer || key->nincrements == 0)
			continue;
		save_key(key);
		key->delta = 0;
		key->nincrements = 0;
	}
	if (!pending->truncated)
	{
		save_buffer(pending);
		pending->truncated = true;
	}
}

/* Has the transaction truncated the buffer? */
bool
pending_truncated(SbBuffer *buffer)
{
	return buffer->pending != NULL && buffer->pending->truncated;
}

static PendingKey *
look_up(SbBuffer *buffer, const KeyBytes *bytes)
{
	PendingKey *key;

	set_searched(buffer, buffer->shape, bytes);
	key = find_searched();
	return key != NULL && key->nincrements > 0 ? key : NULL;
}

/*
 * Request that what the transaction has added to a key is flushed as soon as
 * it is published.  Like increments, the request is undone with the
 * subtransaction.  Returns false if the transaction has added nothing.
 */
bool
pending_request_flush(SbBuffer *buffer, const KeyBytes *bytes)
{
	PendingKey *key = look_up(buffer, bytes);

	if (key == NULL)
		return false;
	if (!key->flush)
	{
		save_key(key);
		key->flush = true;
		counted.flush_requested = true;
	}
	return key->delta != 0;
}

/*
 * Likewise, for everything that the transaction adds to a buffer in which it
 * has already counted.
 */
void
pending_request_flush_all(SbBuffer *buffer)
{
	if (buffer->pending != NULL && !buffer->pending->flush_all)
	{
		save_buffer(buffer->pending);
		buffer->pending->flush_all = true;
		counted.flush_requested = true;
	}
}

/*
 * Get what the transaction has added to a key.  Returns false if it has not
 * incremented the key.
 */
bool
pending_lookup(SbBuffer *buffer, const KeyBytes *bytes, int64 *delta)
{
	PendingKey *key = look_up(buffer, bytes);

	if (key == NULL)
		return false;
	*delta = key->delta;
	return true;
}

/*
 * Get the number of keys that the transaction has added something to, and the
 * sum, which may wrap.  Returns false if there are none.
 */
bool
pending_sum(SbBuffer *buffer, uint64 *nkeys, int64 *sum)
{
	uint64		total = 0;

	*nkeys = 0;
	for (PendingKey *key = buffer->pending ? counted.keys : NULL; key != NULL;
		 key = key->next)
	{
		CHECK_FOR_INTERRUPTS();
		if (pending_key_buffer(key) != buffer || key->delta == 0)
			continue;
		total += (uint64) key->delta;
		(*nkeys)++;
	}
	*sum = (int64) total;
	return *nkeys > 0;
}

/*
 * Begin to merge shared counts of a buffer with the transaction's own: then
 * call pending_scan_key() for each shared key, and pending_scan_rest().
 */
void
pending_begin_scan(SbBuffer *buffer)
{
	for (PendingKey *key = counted.keys; key != NULL; key = key->next)
	{
		CHECK_FOR_INTERRUPTS();
		if (pending_key_buffer(key) == buffer)
			key->scanned = false;
	}
}

/*
 * Like pending_lookup(), but also excludes the key from pending_scan_rest().
 */
bool
pending_scan_key(SbBuffer *buffer, const KeyBytes *bytes, int64 *delta)
{
	PendingKey *key = look_up(buffer, bytes);

	/* a shared key of another shape, with the same bytes, may have got it */
	if (key == NULL || key->scanned)
		return false;
	*delta = key->delta;
	key->scanned = true;
	return true;
}

/*
 * Call the visitor for each key that the transaction has incremented in the
 * buffer, under its present shape, and that pending_scan_key() has not
 * returned.
 */
void
pending_scan_rest(SbBuffer *buffer, PendingVisitor visit, void *arg)
{
	for (PendingKey *key = counted.keys; key != NULL; key = key->next)
	{
		CHECK_FOR_INTERRUPTS();
		if (pending_key_buffer(key) == buffer && key->nincrements > 0 &&
			!key->scanned && is_of_shape(key, buffer->shape))
		{
			KeyBytes	bytes = {key->data, key->len, key->hash};

			visit(&bytes, key->delta, arg);
		}
	}
}

/* ------------------------------------------------------------------------
 * Subtransactions
 * ------------------------------------------------------------------------
 */

static void
subxact_callback(SubXactEvent event, SubTransactionId subid,
				 SubTransactionId parent_subid, void *arg)
{
	if (counted.buffers == NULL)
		return;
	if (event == SUBXACT_EVENT_ABORT_SUB)
	{
		undo_level(GetCurrentTransactionNestLevel());
		/* entries remain, but their relation may no longer be locked */
		buffer_generation++;
	}
	else if (event == SUBXACT_EVENT_COMMIT_SUB)
		merge_levels(GetCurrentTransactionNestLevel() - 1);
}

/* ------------------------------------------------------------------------
 * The end of the transaction
 * ------------------------------------------------------------------------
 */

static void
forget_all(void)
{
	for (PendingBuffer *pending = counted.buffers; pending;
		 pending = pending->next)
		pending->buffer->pending = NULL;

	memset(&counted, 0, sizeof(counted));
	publish_forget();
	pending_hash = NULL;
	broken_hash = NULL;
	block_left = 0;
	block_size = 0;
	undo_stack = NULL;
	nundo = 0;
	undo_size = 0;
	undo_base = 1;
	undo_levels = NULL;
	nundo_levels = 0;
	undo_levels_size = 0;
	undo_merged = false;
	buffer_generation++;

	/*
	 * Only the callback of pending_init() calls this.  It was registered
	 * before these and is therefore called after them, so none of them is
	 * next in the list.
	 */
	for (; nfront > 0; nfront--)
		UnregisterXactCallback(front_callback, NULL);
}

/* Do the part of publishing that can fail, once for a transaction. */
static void
close_transaction(void)
{
	if (closed)
		return;
	closed = true;
	durable_reconcile(false);
	if (counted.buffers == NULL)
		return;

	/* invalidate what callers have cached */
	buffer_generation++;
	publish_prepare(&counted);
}

/* Called before the callbacks of other libraries. */
static void
front_callback(XactEvent event, void *arg)
{
	if (event == XACT_EVENT_PRE_COMMIT)
		close_transaction();
}

static void
xact_callback(XactEvent event, void *arg)
{
	if (event == XACT_EVENT_PRE_COMMIT)
	{
		/* also when a session is idle: see wake_sessions() in launcher.c */
		space_detach_removed();
		close_transaction();
	}
	else
		closed = false;
	if (event == XACT_EVENT_PRE_PREPARE)
		durable_reconcile(true);
	if (counted.buffers == NULL)
		return;

	switch (event)
	{
		case XACT_EVENT_PRE_COMMIT:
			break;
		case XACT_EVENT_COMMIT:
			publish_commit(&counted);
			forget_all();
			break;
		case XACT_EVENT_ABORT:
			publish_abort(&counted);
			forget_all();
			break;
		case XACT_EVENT_PRE_PREPARE:
			for (PendingBuffer *pending = counted.buffers; pending;
				 pending = pending->next)
				if (pending->truncated)
					ereport(ERROR,
							(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
							 errmsg("cannot PREPARE a transaction that has truncated a statbuffer buffer")));
			publish_append_prepared(&counted);
			break;
		case XACT_EVENT_PREPARE:
			publish_prepared(&counted);
			forget_all();
			break;
		case XACT_EVENT_PARALLEL_PRE_COMMIT:
		case XACT_EVENT_PARALLEL_COMMIT:
		case XACT_EVENT_PARALLEL_ABORT:
			/* buffer_open() raises an error in a parallel worker */
			break;
	}
}
