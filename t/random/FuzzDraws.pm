# What random calls are drawn from: the draws themselves, which depend on a
# seed only, and values of many types.

package FuzzDraws;

use strict;
use warnings;

use Digest::MD5 qw(md5);
use Exporter 'import';

our @EXPORT = qw(
  @fit_types @types %unfit %values any_value chance count draw named number
  odd_key pick quoted seed_with value
);

# --- draws ------------------------------------------------------------------

my $tags = 0;

# What is drawn from here on depends on these only.
sub seed_with
{
	srand unpack 'N', md5("@_");
	$tags = 0;
}

sub pick { return $_[ int rand @_ ]; }

sub chance { return rand(100) < $_[0]; }

sub number { return $_[0] + int rand($_[1] - $_[0] + 1); }

# One of (weight, value) pairs; called if it is a function.
sub draw
{
	my @pairs = @_;
	my $sum = 0;

	for (my $i = 0; $i < @pairs; $i += 2) { $sum += $pairs[$i]; }
	my $at = rand $sum;
	while (@pairs > 2 && ($at -= $pairs[0]) >= 0) { splice @pairs, 0, 2; }
	return ref $pairs[1] ? $pairs[1]->() : $pairs[1];    # perhaps a list
}

# A string as a literal, whatever is in it
sub quoted
{
	my $tag = '$q' . ++$tags . '$';

	return $tag . $_[0] . $tag;
}

# --- types, and values of them ----------------------------------------------

# As the text of literals; those that begin with = are expressions.
our %values = (
	text => [
		q{}, 'a', 'b', 'Home', ' a ', "=E'\\t\\n\\001'", '=chr(233)', "=E'\\xE9'", "=repeat('x', 125)",
		"=repeat('x', 126)", "=repeat('x', 127)", "=repeat('x', 1995)", "=repeat('x', 1996)",
		"=repeat('x', 1997)", "=repeat('x', 5000)", "=repeat('long ', 200000)",
		'=(SELECT t FROM toasted WHERE id = 1)', '=(SELECT t FROM toasted WHERE id = 2)',
		'=(SELECT t FROM toasted WHERE id = 3)', '{1,2}', '(1,x)', 'null'
	],
	varchar => [ '', 'a', 'abc', "=repeat('y', 300)" ],
	'varchar(3)' => [ '', 'abc', 'abc   ', 'abcd' ],
	'character(3)' => [ '', 'a', 'a ', 'abcd' ],
	name => [ '', 'a', "=repeat('n', 63)", "=repeat('n', 64)" ],
	'"char"' => [ '', 'a', 'ab', '\\377' ],
	bytea => [ '', '\x00', '\x00ff', "=decode(repeat('00', 2500), 'hex')", '=(SELECT b FROM toasted WHERE id = 1)' ],
	boolean => [ 't', 'f', 'maybe' ],
	smallint => [ '0', '-32768', '32767', '32768' ],
	integer => [ '0', '1', '7', '-2147483648', '2147483647', '2147483648', 'x' ],
	bigint => [ '0', '1', '-9223372036854775808', '9223372036854775807', '9223372036854775808' ],
	oid => [ '0', '1', '4294967295', '-1' ],
	real => [ '0', '-0', 'NaN', 'Infinity', '1e-45', '1e39' ],
	'double precision' => [ '0', '-0', 'NaN', '-Infinity', '1e-320', '0.1' ],
	numeric => [ '0', '0.0', '1', '1.0', '1.00', '-1', 'NaN', 'Infinity', '-Infinity', '1e131000', '1e-16000',
		"=('0.' || repeat('123456789', 600))::numeric" ],
	'numeric(5,2)' => [ '0', '1', '999.994', '999.995', 'NaN' ],
	money => [ '0', '-92233720368547758.08', '1.005' ],
	date => [ 'infinity', '-infinity', '4713-01-01 BC', '2000-02-30', '2024-02-29', 'today' ],
	time => [ '00:00', '24:00', '23:59:60' ],
	timetz => [ '00:00+14', '24:00-15:59' ],
	timestamp => [ 'infinity', '-infinity', '294276-12-31 23:59:59.999999', '1970-01-01' ],
	timestamptz => [ 'infinity', '-infinity', 'epoch', 'now', '=clock_timestamp()' ],
	interval => [ '1 month', '30 days', '720 hours', '-178000000 years', '1 microsecond' ],
	uuid => [ '00000000-0000-0000-0000-000000000000', 'ffffffff-ffff-ffff-ffff-ffffffffffff', 'x' ],
	inet => [ '127.0.0.1', '127.0.0.1/8', '::1', '::ffff:1.2.3.4' ],
	cidr => [ '10/8', '::/0' ],
	macaddr => [ '00:00:00:00:00:00' ],
	macaddr8 => [ 'ff:ff:ff:ff:ff:ff:ff:ff' ],
	'bit(8)' => [ '10101010', '1' ],
	varbit => [ '', '1', "=repeat('10', 9000)::varbit" ],
	json => [ '{}', '{"a":1}', '{"a": 1}', '[', "=('[' || repeat('1,', 3000) || '1]')::json" ],
	jsonb => [ '{}', '{"a":1}', '{"a": 1}', 'null', '=(SELECT j FROM toasted WHERE id = 1)', '1e400' ],
	jsonpath => [ '$.a', '$[*] ? (@ > 1)' ],
	tsvector => [ '', 'a:1A b', 'b a' ],
	tsquery => [ '', 'a & b', 'a <-> b' ],
	point => [ '(0,0)', '(NaN,Infinity)' ],
	lseg => ['[(0,0),(1,1)]'],
	box => ['(1,1),(0,0)'],
	path => ['[(0,0),(1,1)]'],
	polygon => ['((0,0),(1,1),(2,0))'],
	circle => ['<(0,0),1>'],
	int4range => [ 'empty', '[1,5)', '[1,4]', '(,)' ],
	numrange => [ '[1.0,2.00)', '[1,2)' ],
	tstzrange => ['[-infinity,infinity]'],
	int4multirange => [ '{}', '{[1,3),[2,5)}' ],
	'integer[]' => [ '{}', '{1,2}', '{NULL}', '[0:1]={1,2}', '{{1,2},{3,4}}', '=expanded(3)', '=expanded(2000)',
		'=(SELECT a FROM toasted WHERE id = 1)' ],
	'text[]' => [ '{}', '{a,NULL,"NULL"}', "=ARRAY[repeat('z', 1500), repeat('z', 1500)]" ],
	int2vector => [ '', '1 2 3' ],
	oidvector => [ '', '1 2 3' ],
	regclass => [ '0', 'pg_class', '4294967295', 'no_such' ],
	regtype => [ 'int4', '0' ],
	regprocedure => [ 'sb_flush_all(regclass)', '-' ],
	pg_lsn => [ '0/0', 'FFFFFFFF/FFFFFFFF' ],
	tid => ['(0,1)'],
	xid => [ '0', '1', '2', '3', '4294967295' ],
	xid8 => ['18446744073709551615'],
	pg_snapshot => ['10:20:10,14,15'],
	refcursor => ['c'],
	aclitem => ['=r/fuzz_owner'],
	mood_t => [ 'sad', 'glad', 'mad', 'other' ],
	positive => [ '1', '0', '-1', '7' ],
	never_null => [ 'x', '' ],
	counted => [ 'x', 'bad' ],
	trying => [ 'x', 'y', '' ],
	few => [ '{1}', '{1,2,3,4}' ],
	comp => [ '(1,x,"{1,2}")', '(,,)', '(1)', '=expanded_row()', '=ROW(1, repeat(\'c\', 3000), ARRAY[1])::comp',
		'=(SELECT c FROM toasted WHERE id = 1)' ],
	some_comp => [ '(1,x,"{1,2}")', '(-1,x,)' ],
	'comp[]' => [ '{}', '{"(1,x,{1})",NULL}' ],
	holed => [ '(1,x)', '(,)', '(1,x,y)', '=(SELECT h FROM holed h LIMIT 1)' ],
	shifty => [ '(1,x)', '(1)', '(,)' ],
	nested => [ '("(1,x,{1})","{""(2,y,{})""}")', '(,)' ],
	text_range => [ '[a,b)', 'empty' ],
	moody => [ 'a', 'b', 'c', 'd', "=repeat('m', 500)::text::moody" ],
	unordered => [ 'a', 'b', 'c' ],
	fragile => [ 'a', 'b' ],
	fleeting => [ '1', '2' ]);

our @types = sort keys %values;

# Those whose buffers cannot be drained, or whose keys may change their form
our %unfit = map { $_ => 1 } qw(fragile moody shifty holed fleeting);
our @fit_types = grep { !$unfit{$_} } @types;

# The name of the buffer of a type
sub named
{
	my ($prefix, $type) = @_;

	$type =~ s/\[\]/s/;
	$type =~ s/[^a-z0-9]+/_/g;
	$type =~ s/^_|_$//g;
	return "${prefix}_$type";
}

# A value of a type, as such or in one of the ways to say it less clearly
sub value
{
	my ($type) = @_;
	my $value = pick(@{ $values{$type} });

	return "NULL::$type" if chance(4);
	if ($value =~ s/^=//)
	{
		return chance(80) ? $value : "($value)::$type";
	}
	$value =~ s/'/''/g;
	return draw(
		60 => "'$value'::$type",
		25 => "'$value'",
		15 => "'$value'::text");
}

sub any_value { return value(pick(@types)); }

# What should not be given as a key
sub odd_key
{
	return draw(
		10 => 'NULL',
		5 => "''",
		5 => "'x'::unknown",
		10 => sub { any_value() },
		5 => 'ROW()',
		5 => 'ROW(NULL)',
		5 => 'ROW(NULL, NULL)',
		10 => sub { 'ROW(' . join(', ', map { any_value() } 1 .. number(1, 5)) . ')' },
		2 => sub { 'ROW(' . join(', ', (1) x number(90, 1600)) . ')' },
		3 => '(SELECT r FROM (SELECT 1 AS a, \'x\'::text AS b) r)',
		3 => 'expanded_record()',
		3 => '(SELECT r FROM pg_class r LIMIT 1)',
		3 => '(SELECT h FROM holed h LIMIT 1)',
		3 => '(SELECT t FROM toasted t WHERE id = 2)',
		3 => 'ARRAY[1, 2]',
		2 => 'ARRAY[ROW(1, \'x\')]',
		3 => '(SELECT 1 WHERE false)',
		3 => '1 / 0',
		2 => 'random()',
		2 => 'sb_count(\'x\', \'b_text\')',
		2 => 'sb_keys(\'b_text\')',
		2 => 'CAST(ROW(1, \'x\') AS record)');
}

sub count
{
	return draw(
		60 => sub { number(-3, 9) },
		5 => '0',
		5 => 'NULL',
		3 => '1099511627777',
		3 => '-1099511627777',
		2 => '9223372036854775807',
		2 => '-9223372036854775808',
		1 => '9223372036854775808',
		1 => '1.5',
		1 => '1e30',
		1 => "'x'",
		1 => "'7'",
		1 => '3::smallint',
		1 => '(SELECT 5)',
		1 => 'NULL::bigint');
}

1;
