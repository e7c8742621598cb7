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
 * Maximum size of a description.  It suffices for the row type of any table,
 * and for several thousand fields of nested ones.
 */
#define SHAPE_MAX_SIZE		(32 * 1024)

/*
 * A description of the key columns, and of every row type that occurs in them.
 * It is a sequence of bytes without holes, so two shapes are equal if their
 * bytes are.  Shapes are not compared by a hash, because users who create
 * types could search for two with the same hash.
 */
typedef struct KeyShape
{
	uint32		size;			/* total size in bytes */
	uint32		ntypes;
	char		data[FLEXIBLE_ARRAY_MEMBER];	/* ShapeType, ShapeAttr... */
} KeyShape;

extern KeyShape *shape_describe(TupleDesc desc, List **row_types);
extern bool shape_is_valid(const KeyShape *shape, uint32 size);
extern bool shape_equal(const KeyShape *a, const KeyShape *b);
extern bool shape_can_read(const KeyShape *shape, const KeyShape *older);

#endif							/* STATBUFFER_SHAPE_H */
