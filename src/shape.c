/*-------------------------------------------------------------------------
 *
 * shape.c
 *	  The shape of keys: what their stored forms consist of.
 *
 * A key is only found under the shape with which it was stored, and only read
 * under that shape or a later one that can read it.  A shape lists the types of
 * the key columns and, once each, the row types that occur in them, because
 * PostgreSQL allows row types to be altered while foreign tables use them.
 *
 * This room owns nothing and takes no locks.  Callers that need a row type to
 * stay as described must lock it.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "compat.h"
#include "miscadmin.h"
#include "shape.h"
#include "utils/lsyscache.h"
#include "utils/typcache.h"

/*
 * Maximum number of types that we look up.  Arrays, ranges and domains take no
 * space in the description, but looking through them takes time.
 */
#define SHAPE_MAX_LOOKUPS	20000

/* A column or field. */
typedef struct ShapeAttr
{
	Oid			typid;			/* base type, or InvalidOid if dropped */
	int16		len;
	char		align;
	char		plain;			/* never has a short header */
} ShapeAttr;

/*
 * The key columns (typid is InvalidOid) or a row type, followed by its
 * attributes.
 */
typedef struct ShapeType
{
	Oid			typid;
	uint32		natts;
} ShapeType;

StaticAssertDecl(sizeof(ShapeAttr) == 8 && sizeof(ShapeType) == 8 &&
				 offsetof(KeyShape, data) == 12,
				 "a description must have no holes");

#define SHAPE_ATTRS(type)	((ShapeAttr *) ((type) + 1))

static ShapeType *
first_type(const KeyShape *shape)
{
	return (ShapeType *) shape->data;
}

static ShapeType *
next_type(const ShapeType *type)
{
	return (ShapeType *) (SHAPE_ATTRS(type) + type->natts);
}

/* The numbers of the key columns. */
static AttrNumber *
columns_of(const KeyShape *shape)
{
	return (AttrNumber *) ((char *) shape + shape->end);
}

static Size
columns_size(const KeyShape *shape)
{
	return first_type(shape)->natts * sizeof(AttrNumber);
}

/* Find a row type in a description, or return NULL. */
static ShapeType *
find_type(const KeyShape *shape, Oid typid)
{
	ShapeType  *type = first_type(shape);

	for (uint32 i = 0; i < shape->ntypes; i++)
	{
		if (type->typid == typid)
			return type;
		type = next_type(type);
	}
	return NULL;
}

static void
report_too_complex(void)
{
	ereport(ERROR,
			(errcode(ERRCODE_PROGRAM_LIMIT_EXCEEDED),
			 errmsg("types of the key columns are too complex"),
			 errdetail("The row types that occur in them have too many fields."),
			 errhint("Use a key of fewer fields, or a digest of the value.")));
}

/*
 * Find the row type that values of a type contain, looking through domains,
 * arrays and ranges.  Returns InvalidOid if there is none.
 */
static Oid
contained_row_type(Oid type, int *nlookups)
{
	for (;;)
	{
		Oid			inner;

		CHECK_FOR_INTERRUPTS();
		if (++*nlookups > SHAPE_MAX_LOOKUPS)
			report_too_complex();

		type = getBaseType(type);
		if (OidIsValid(inner = get_element_type(type)) ||
			OidIsValid(inner = get_range_subtype(type)) ||
			OidIsValid(inner = get_multirange_range(type)))
			type = inner;
		else if (type != RECORDOID && type_is_rowtype(type))
			return type;
		else
			return InvalidOid;
	}
}

/*
 * Append a type to a description, and append to `row_types' those row types
 * that occur in it and are not listed yet.
 */
static void
add_type(KeyShape *shape, Oid typid, TupleDesc desc, List **row_types,
		 int *nlookups)
{
	ShapeType  *type = (ShapeType *) ((char *) shape + shape->size);
	ShapeAttr  *attr = SHAPE_ATTRS(type);
	Size		size = sizeof(ShapeType) + desc->natts * sizeof(ShapeAttr);

	if (shape->size + size > SHAPE_MAX_TYPES)
		report_too_complex();
	type->typid = typid;
	type->natts = desc->natts;
	for (int i = 0; i < desc->natts; i++, attr++)
	{
		Form_pg_attribute att = TupleDescAttr(desc, i);
		Oid			row_type;

		attr->typid = InvalidOid;
		attr->len = att->attlen;
		attr->align = att->attalign;
		attr->plain = 0;
		if (att->attisdropped)
			continue;
		attr->typid = getBaseType(att->atttypid);
		attr->plain = att->attstorage == TYPSTORAGE_PLAIN;
		row_type = contained_row_type(attr->typid, nlookups);
		if (OidIsValid(row_type))
			*row_types = list_append_unique_oid(*row_types, row_type);
	}
	shape->size += size;
	shape->ntypes++;
}

/*
 * Describe key columns, which have these numbers in their relation, or NULL.
 * The result, and the list of the row types that occur in them, are in the
 * current memory context.
 *
 * Each row type is described once, however often it occurs.  Raises an error
 * if the description would be too large.  Takes no lock on row types: the
 * caller must lock them, and describe the columns again if that may have been
 * too late.
 */
KeyShape *
shape_describe(TupleDesc desc, const AttrNumber *columns, List **row_types)
{
	KeyShape   *room = palloc(SHAPE_MAX_TYPES);
	KeyShape   *shape;
	int			nlookups = 0;

	room->size = offsetof(KeyShape, data);
	room->ntypes = 0;
	*row_types = NIL;
	add_type(room, InvalidOid, desc, row_types, &nlookups);

	/* the list grows while we go through it */
	for (int i = 0; i < list_length(*row_types); i++)
	{
		Oid			typid = list_nth_oid(*row_types, i);
		TupleDesc	row = lookup_rowtype_tupdesc(typid, -1);

		add_type(room, typid, row, row_types, &nlookups);
		ReleaseTupleDesc(row);
	}

	room->end = room->size;
	room->size += columns_size(room);
	shape = palloc0(room->size);
	memcpy(shape, room, room->end);
	pfree(room);
	if (columns != NULL)
		memcpy(columns_of(shape), columns, columns_size(shape));
	return shape;
}

/*
 * Make a descriptor of the key columns of a shape, whose names and typmods are
 * not known, in the current memory context.  Returns NULL if one of their types
 * is gone, or is not what it was.  Looks at no fields of row types: the caller
 * must describe the descriptor, and see whether that can read the shape.
 */
TupleDesc
shape_make_desc(const KeyShape *shape)
{
	const ShapeType *columns = first_type(shape);
	const ShapeAttr *attr = SHAPE_ATTRS(columns);
	TupleDesc	desc = CreateTemplateTupleDesc(columns->natts);

	for (int i = 0; i < desc->natts; i++)
	{
		Form_pg_attribute att = TupleDescAttr(desc, i);

		if (!get_typisdefined(attr[i].typid))
			return NULL;
		TupleDescInitEntry(desc, i + 1, NULL, attr[i].typid, -1, 0);
		if (att->attlen != attr[i].len || att->attalign != attr[i].align)
			return NULL;
	}
	TupleDescFinalize(desc);
	return desc;
}

/*
 * Is this a well-formed description of `size' bytes?  Used for shapes that
 * were read from a file.
 */
bool
shape_is_valid(const KeyShape *shape, uint32 size)
{
	uint64		offset = offsetof(KeyShape, data);

	if (size < offset || shape->size != size || shape->end > size)
		return false;
	for (uint32 i = 0; i < shape->ntypes; i++)
	{
		const ShapeType *type = (const ShapeType *) ((const char *) shape + offset);

		if (offset + sizeof(ShapeType) > shape->end)
			return false;
		offset += sizeof(ShapeType) + (uint64) type->natts * sizeof(ShapeAttr);
		if (offset > shape->end)
			return false;
	}
	return offset == shape->end && shape->ntypes > 0 &&
		shape->end + columns_size(shape) == size;
}

/* Are keys of both shapes formed and read in the same way? */
bool
shape_equal(const KeyShape *a, const KeyShape *b)
{
	return a->end == b->end && a->ntypes == b->ntypes &&
		memcmp(a->data, b->data, a->end - offsetof(KeyShape, data)) == 0;
}

/* Are the key columns the same, if perhaps of other types? */
bool
shape_same_columns(const KeyShape *a, const KeyShape *b)
{
	return columns_size(a) == columns_size(b) &&
		memcmp(columns_of(a), columns_of(b), columns_size(a)) == 0;
}

/* Copy the numbers of the columns from a shape that is equal. */
void
shape_set_columns(KeyShape *shape, const KeyShape *from)
{
	Assert(shape_equal(shape, from));
	memcpy(columns_of(shape), columns_of(from), columns_size(shape));
}

/*
 * Can values that were stored under an older version of a row type be read?
 * Fields may have been dropped, which are skipped, and added at the end.
 */
static bool
fields_can_read(const ShapeType *type, const ShapeType *older)
{
	const ShapeAttr *attr = SHAPE_ATTRS(type);
	const ShapeAttr *old_attr = SHAPE_ATTRS(older);

	if (type->natts < older->natts)
		return false;
	for (uint32 i = 0; i < older->natts; i++)
		if (attr[i].len != old_attr[i].len ||
			attr[i].align != old_attr[i].align ||
			(OidIsValid(attr[i].typid) && attr[i].typid != old_attr[i].typid))
			return false;
	return true;
}

/*
 * Can keys that were stored under the older shape be read under this one?
 * They can if the types of their columns are the same and their row types
 * satisfy fields_can_read().
 */
bool
shape_can_read(const KeyShape *shape, const KeyShape *older)
{
	const ShapeType *type = first_type(shape);

	if (type->natts != first_type(older)->natts)
		return false;
	for (uint32 i = 0; i < shape->ntypes; i++)
	{
		const ShapeType *old_type = find_type(older, type->typid);

		/* a new row type can only occur in new fields */
		if (old_type != NULL && !fields_can_read(type, old_type))
			return false;
		type = next_type(type);
	}
	return true;
}
