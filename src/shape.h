/*-------------------------------------------------------------------------
 *
 * shape.h
 *	  The shape of keys: what their stored forms consist of.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#ifndef STATBUFFER_SHAPE_H
#define STATBUFFER_SHAPE_H

#include "access/tupdesc.h"
#include "nodes/pg_list.h"

/*
 * The longest description: enough for any table's row type, and for several
 * thousand fields of nested ones.
 */
#define SHAPE_MAX_SIZE		(32 * 1024)

/*
 * A description of the key columns, and of every row type that occurs in them:
 * one run of bytes without holes, so that two shapes are the same if their
 * bytes are.  It is compared as it is, not by a hash, because whoever makes
 * types could look for two that have the same hash.
 */
typedef struct KeyShape
{
	uint32		size;			/* of all of it, in bytes */
	uint32		ntypes;
	char		data[FLEXIBLE_ARRAY_MEMBER];	/* ShapeType, ShapeAttr... */
} KeyShape;

extern KeyShape *shape_describe(TupleDesc desc, List **row_types);
extern bool shape_is_valid(const KeyShape *shape, uint32 size);
extern bool shape_equal(const KeyShape *a, const KeyShape *b);
extern bool shape_can_read(const KeyShape *shape, const KeyShape *older);

#endif							/* STATBUFFER_SHAPE_H */
