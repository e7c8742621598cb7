# What the fuzz test calls: a world of buffers, types and functions that mean
# no good, and a generator of calls.
#
# Calls come in units of a few messages: unit N of seed S is always the same.
# What a unit does to its session it undoes at its end, as far as it gets.
#
# Buffers are named by what may happen to them.  `control' is only counted in
# together with a ledger, and is never truncated or altered.  Those named b_*
# keep their shape, so that they can be drained in the end.  What happens to
# k_*, f_*, r_* and s_* is anybody's guess.

package FuzzCalls;

use strict;
use warnings;

use Digest::MD5 qw(md5);
use Exporter 'import';
use FindBin;
use FuzzSession qw(simple extended fast_path copy_in);
use PostgreSQL::Test::Utils;

our @EXPORT_OK = qw(roles surroundings definitions ddl_surroundings unit steady_unit);

# Do most units alter what they are working with?  It takes ddl_surroundings().
our $ddl = 0;

# ------------------------------------------------------------------------
# Draws
# ------------------------------------------------------------------------

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

# ------------------------------------------------------------------------
# Types, and values of them
# ------------------------------------------------------------------------

# As the text of literals; those that begin with = are expressions.
my %values = (
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

my @types = sort keys %values;

# Those whose buffers can't be drained, or whose keys may change their form
my %unfit = map { $_ => 1 } qw(fragile moody shifty holed fleeting);
my @fit_types = grep { !$unfit{$_} } @types;

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

# ------------------------------------------------------------------------
# Buffers and what isn't one
# ------------------------------------------------------------------------

my @no_buffers = qw(pg_class a_view a_table a_index a_sequence a_matview a_partitioned comp pg_toast.pg_toast_2619 a_foreign
  s_none s_one s_int s_domain s_generated s_parent);
my @odd_buffers = qw(s_wide s_hundred s_holed s_child s_partition s_trigger s_plain s_nologin s_nohandler
  s_serial s_null s_pair s_many);
my @free = map { "f_$_" } 1 .. 6;
my @rude = map { "r_$_" } 1 .. 3;

# The types of key columns of a buffer, where they can be known
my %shape = (
	(map { named('b', $_) => [$_] } @fit_types),
	(map { named('k', $_) => [$_] } @types),
	control => ['text'],
	s_holed => [ 'integer', 'text' ],
	s_child => ['text'],
	s_partition => ['text'],
	s_trigger => ['text'],
	s_plain => ['text'],
	s_nologin => ['text'],
	s_nohandler => ['text'],
	s_serial => ['integer'],
	s_null => [ 'text', 'integer' ],
	s_pair => [ 'integer', 'text' ],
	s_many => [ 'text', 'date', 'numeric', 'integer[]', 'comp', 'boolean' ],
	s_wide => [ ('integer') x 1599 ],
	s_hundred => [ ('"char"') x 98 ],
	(map { $_ => ['text'] } @rude));

# What may be counted in, to be read, flushed, stopped and truncated
sub buffer
{
	return draw(
		50 => sub { named('b', pick(@fit_types)) },
		14 => sub { pick('b_text', 'b_integer', 's_pair') },
		14 => sub { named('k', pick(@types)) },
		8 => sub { pick(@odd_buffers) },
		8 => sub { pick(@free) },
		6 => sub { pick(@rude) });
}

# An argument for a buffer; `$name' is how it would be right
sub buffer_argument
{
	my ($name) = @_;

	return draw(
		70 => "'$name'",
		8 => "'$name'::regclass",
		4 => "'public.$name'",
		4 => "(SELECT oid FROM pg_class WHERE relname = '$name' LIMIT 1)",
		3 => 'NULL',
		1 => '0',
		1 => '0::regclass',
		1 => '4294967295::oid::regclass',
		1 => '1259',
		1 => "'no such'",
		1 => "''",
		1 => '-1',
		1 => "'$name.key'",
		1 => "'pg_temp.$name'",
		3 => sub { "'" . pick(@no_buffers) . "'" });
}

# A key for a buffer, right or not
sub key
{
	my ($name) = @_;
	my $shape = $shape{$name} || [ pick(@types) ];

	return odd_key() if chance(15);
	return 'ROW(' . join(', ', map { value($_) } @$shape) . ')' if @$shape > 1;
	return value($shape->[0]);
}

# ------------------------------------------------------------------------
# Calls
# ------------------------------------------------------------------------

sub seconds
{
	return draw(
		8 => "'20ms'",
		4 => "'0'",
		2 => "'-1s'",
		1 => "'infinity'",
		1 => "'178000000 years'",
		1 => 'NULL',
		1 => "'x'",
		1 => "'-1 month 30 days'");
}

# A call of one of the functions, as an expression.  In a call that repeats,
# `$g' is what counts it.
sub call
{
	my ($g) = @_;
	my $name = buffer();
	my $buffer = buffer_argument($name);
	my $key = key($name);

	$key = draw(
		3 => "'k' || $g",
		1 => $g,
		1 => "ROW($g, 'x')",
		1 => "repeat('x', $g)",
		1 => $key) if defined $g && chance(60);

	return draw(
		34 => sub { "sb_increment($key, " . count() . ", $buffer)" },
		4 => "sb_increment($key, buffer => $buffer)",
		2 => "sb_increment(key => $key, buffer => $buffer, count => " . count() . ')',
		1 => sub { "sb_increment($key, " . count() . ')' },
		1 => "sb_increment($key)",
		10 => sub { "sb_async_increment($key, " . count() . ", $buffer)" },
		2 => "sb_async_increment($key, buffer => $buffer)",
		12 => "sb_count($key, $buffer)",
		6 => "sb_flush($key, $buffer)",
		3 => "sb_flush_all($buffer)",
		2 => sub { "sb_drain($buffer, " . seconds() . ')' },
		1 => sub { "sb_start($buffer)" },
		1 => sub { chance(20) ? "sb_stop($buffer)" : "sb_start($buffer)" },
		4 => "(SELECT count(*) FROM sb_keys($buffer))",
		2 => "sb_keys($buffer)",
		1 => "sb_stat_reset($buffer)",
		2 => "sb_stat_get_buffer($buffer)",
		1 => sub { "sb_increment($key, sb_count($key, $buffer), " . buffer_argument(buffer()) . ')' });
}

sub table_of_numbers { return 'generate_series(1, ' . draw(4 => 20, 1 => 300, 1 => 0) . ')'; }

# A call somewhere in a query
sub query
{
	my $plain = call();
	my $repeated = call('g');
	my $many = table_of_numbers() . ' AS g';
	my $name = buffer();

	return draw(
		30 => "SELECT $plain",
		8 => "SELECT $plain, " . call(),
		8 => "SELECT $repeated FROM $many",
		3 => "SELECT g FROM $many WHERE ($repeated) IS NULL",
		2 => "SELECT count($repeated) FROM $many",
		2 => "SELECT count(*) FILTER (WHERE ($repeated) IS NOT NULL) OVER (ORDER BY g ROWS 2 PRECEDING) FROM $many",
		2 => "SELECT g FROM $many ORDER BY ($repeated) IS NULL, g LIMIT 3",
		2 => "SELECT ($repeated) IS NULL AS x, count(*) FROM $many GROUP BY 1 HAVING ($plain) IS NULL",
		2 => "SELECT CASE WHEN g % 2 = 0 THEN ($repeated) IS NULL ELSE ($plain) IS NULL END FROM $many",
		2 => "SELECT * FROM $many, LATERAL (SELECT ($repeated) IS NULL OFFSET 0) l",
		2 => sub { "SELECT * FROM ROWS FROM (sb_keys(" . buffer_argument($name) . '), generate_series(1, 5)) r' },
		2 => sub { "SELECT * FROM $many LEFT JOIN LATERAL sb_keys(" . buffer_argument($name) . ') k ON k.count > g' },
		2 => sub { "SELECT (k).* FROM (SELECT sb_keys(" . buffer_argument($name) . ') k) s' },
		2 => "WITH c AS MATERIALIZED (SELECT ($repeated) IS NULL AS x FROM $many) SELECT * FROM c, c AS d LIMIT 50",
		2 => "SELECT ($plain) IS NULL UNION SELECT ($repeated) IS NULL FROM $many",
		1 => "VALUES (($plain) IS NULL), (true)",
		1 => "SELECT EXISTS (SELECT $repeated FROM $many)",
		1 => "SELECT ARRAY(SELECT ($repeated) IS NULL FROM $many)",
		2 => "SELECT counted_agg(('k' || g)::text) FROM $many",
		2 => "SELECT counting('a_table ' || n) FROM a_table",
		1 => "SELECT count(*) FROM a_table WHERE counting('x') = 'x'",
		1 => "SELECT sb_increment('t' || g, 1, '$name') FROM $many WHERE try('SELECT 1 / (random() * 2)::int', g % 3) IS NOT NULL",
		1 => "SELECT counted_agg(('k' || g)::text) OVER (ORDER BY g ROWS BETWEEN 1 PRECEDING AND 1 FOLLOWING) FROM $many",
		1 => "SELECT 'a'::text ## '$name'::regclass FROM $many",
		2 => "INSERT INTO a_table SELECT g FROM $many RETURNING ($repeated) IS NULL",
		1 => "UPDATE a_table SET n = n + 1 WHERE n < 3 RETURNING ($plain) IS NULL",
		1 => "DELETE FROM a_table WHERE ($plain) IS NULL",
		1 => "CREATE TEMP TABLE IF NOT EXISTS t_made AS SELECT ($repeated) IS NULL AS x FROM $many",
		1 => "SELECT $repeated INTO TEMP t_void FROM $many",
		1 => "REFRESH MATERIALIZED VIEW a_matview",
		3 => "EXPLAIN (VERBOSE) SELECT $repeated FROM $many",
		2 => "EXPLAIN (ANALYZE, VERBOSE, BUFFERS, FORMAT JSON) SELECT $repeated FROM $many");
}

# What a SELECT can do with a buffer
sub selection
{
	my $b = chance(92) ? buffer() : pick('control', @no_buffers);
	my $c = chance(50) ? $b : buffer();

	return draw(
		10 => "SELECT * FROM $b",
		4 => "SELECT count(*), max(n), sum(n), min(key) FROM $b",
		3 => "SELECT * FROM $b WHERE key = " . value(pick(@types)),
		3 => "SELECT * FROM $b ORDER BY n DESC, key LIMIT 5 OFFSET 1",
		3 => "SELECT * FROM $b WHERE n > " . count(),
		3 => "SELECT * FROM $b x JOIN $c y ON x.n = y.n LIMIT 500",
		3 => "SELECT * FROM $b x FULL JOIN $c y ON x.key::text = y.key::text LIMIT 500",
		2 => "SELECT x FROM $b x, LATERAL (SELECT y FROM $c y WHERE y.n = x.n OFFSET 0) l LIMIT 500",
		2 => "SELECT x.*::text FROM $b x",
		2 => "SELECT tableoid::regclass, * FROM $b",
		1 => "SELECT ctid, xmin, cmin, xmax FROM $b",
		2 => "SELECT * FROM $b FOR UPDATE",
		1 => "SELECT * FROM $b FOR KEY SHARE SKIP LOCKED",
		1 => "SELECT * FROM $b TABLESAMPLE SYSTEM (50)",
		2 => "SELECT * FROM ONLY $b",
		1 => "SELECT * FROM $b b WHERE EXISTS (SELECT FROM $c c WHERE c.n < b.n) LIMIT 100",
		1 => "SELECT * FROM $b b WHERE n NOT IN (SELECT n FROM $c) LIMIT 100",
		1 => "SELECT key, sum(n) OVER (PARTITION BY n % 3 ORDER BY n) FROM $b",
		1 => "SELECT key, sum(n) FROM $b GROUP BY GROUPING SETS ((key), ())",
		1 => "SELECT DISTINCT n FROM $b UNION ALL SELECT n FROM $c",
		1 => "WITH RECURSIVE r AS (SELECT n, 1 AS d FROM $b UNION ALL SELECT b.n, d + 1 FROM r JOIN $b b USING (n)"
		  . ' WHERE d < 3) SELECT count(*) FROM (SELECT FROM r LIMIT 1000) l',
		2 => "UPDATE hot_rows SET n = hot_rows.n + 1 FROM $b b WHERE hot_rows.id = abs(b.n % 3)",
		1 => "SELECT * FROM hot_rows h JOIN $b b ON h.id = abs(b.n % 3) FOR UPDATE",
		1 => 'SELECT * FROM a_partitioned',
		1 => 'SELECT * FROM s_parent',
		1 => "SELECT * FROM v_text WHERE key <> 'x'",
		1 => "ANALYZE $b",
		1 => "VACUUM $b",
		1 => "LOCK TABLE $b IN SHARE MODE NOWAIT",
		1 => "COMMENT ON FOREIGN TABLE $b IS 'a comment'",
		3 => "EXPLAIN (ANALYZE, VERBOSE) SELECT * FROM $b x JOIN $c y USING (key)",
		1 => "EXPLAIN SELECT * FROM $b WHERE n = 1",
		4 => 'SELECT *, length(last_error), upper(last_error) FROM sb_stat_buffers',
		2 => "SELECT * FROM sb_stat_buffers s, sb_keys(s.buffer) k WHERE s.buffer = '$b'::regclass",
		3 => "SELECT k.*, length(k.last_error) FROM sb_keys('$b') k");
}

# Ways to insert
sub insertion
{
	my $b = chance(95) ? buffer() : pick(@no_buffers);
	my @shape = @{ $shape{$b} || ['text'] };
	my $row = sub {
		return @shape > 20 ? 'DEFAULT' : join(', ', (map { chance(96) ? value($_) : 'DEFAULT' } @shape),
			chance(60) ? (count()) : chance(30) ? ('DEFAULT') : ());
	};
	my $short = sub { join(', ', map { value($_) } @shape > 20 ? () : @shape) };

	return draw(
		20 => sub { "INSERT INTO $b VALUES (" . $row->() . ')' },
		6 => sub { my $n = @shape; "INSERT INTO $b VALUES " . join(', ', map { '(' . $short->() . ", $_)" } 1 .. 3) },
		4 => sub { "INSERT INTO $b SELECT " . $short->() . ', g FROM ' . table_of_numbers() . ' AS g' },
		4 => "INSERT INTO $b SELECT 'k' || g, g FROM generate_series(1, 50) AS g",
		3 => "INSERT INTO $b SELECT g, 1 FROM generate_series(1, 50) AS g",
		2 => "INSERT INTO $b SELECT * FROM $b",
		2 => sub { "INSERT INTO $b SELECT * FROM " . buffer() },
		2 => "INSERT INTO $b DEFAULT VALUES",
		2 => sub { "INSERT INTO $b (n) VALUES (" . count() . ')' },
		2 => sub { "INSERT INTO $b (key) VALUES (" . $short->() . ') RETURNING *, tableoid::regclass' },
		1 => sub { "INSERT INTO $b (key) VALUES (" . $short->() . ') RETURNING ctid, xmin' },
		2 => sub { "INSERT INTO $b VALUES (" . $short->() . ', 1) ON CONFLICT DO NOTHING' },
		1 => sub { "INSERT INTO $b VALUES (" . $short->() . ', 1) ON CONFLICT (key) DO UPDATE SET n = 1' },
		2 => "INSERT INTO $b SELECT 't' || g, 1 FROM generate_series(1, 9) AS g"
		  . " WHERE try('SELECT 1 / (random() * 2)::int', g % 3) IS NOT NULL",
		1 => "INSERT INTO v_text VALUES ('x'), ('y')",
		1 => "INSERT INTO v_text VALUES ('y', 3) RETURNING *",
		2 => "INSERT INTO a_partitioned VALUES ('x', 1), ('y', 2)",
		1 => "INSERT INTO a_partitioned VALUES ('z', 1)",
		2 => "WITH i AS (INSERT INTO $b SELECT 'w' || g, 1 FROM generate_series(1, 5) g RETURNING *) SELECT * FROM i, $b LIMIT 100",
		1 => "WITH i AS (INSERT INTO $b VALUES ('1', 1)), t AS (SELECT sb_increment('1', 2, '$b')) SELECT * FROM t",
		1 => sub { "EXPLAIN (ANALYZE, VERBOSE) INSERT INTO $b VALUES (" . $short->() . ', 1)' },
		1 => "EXPLAIN INSERT INTO $b SELECT 1",
		1 => "INSERT INTO contexts (a, c) VALUES ('x', 'y'), (DEFAULT, 'bad')",
		3 => sub { "INSERT INTO contexts (a, c) VALUES (" . value('text') . ", 'y')" },
		2 => "INSERT INTO guarded VALUES ('x'), ('y')",
		2 => "INSERT INTO triggered VALUES ('x'), ('y')",
		1 => "INSERT INTO ruled VALUES ('x')",
		1 => "INSERT INTO v_instead VALUES ('x', 1)");
}

# What is refused, or should be
sub refused
{
	my $b = buffer();

	return draw(
		3 => "UPDATE $b SET n = 1",
		3 => "DELETE FROM $b",
		2 => "MERGE INTO $b USING (VALUES ('x', 1)) v (k, c) ON key::text = k"
		  . ' WHEN MATCHED THEN DELETE WHEN NOT MATCHED THEN INSERT VALUES (k, c)',
		1 => "UPDATE $b SET n = 1 RETURNING *",
		1 => "EXPLAIN UPDATE $b SET n = 1",
		1 => "CREATE INDEX ON $b (key)",
		1 => "CREATE UNIQUE INDEX ON $b (key)",
		1 => "ALTER TABLE $b ADD PRIMARY KEY (key)",
		1 => "ALTER TABLE $b ENABLE ROW LEVEL SECURITY",
		1 => "CLUSTER $b",
		1 => "SELECT * FROM $b WHERE CURRENT OF no_cursor",
		1 => "IMPORT FOREIGN SCHEMA x FROM SERVER statbuffer INTO public",
		1 => "ALTER SERVER statbuffer OPTIONS (ADD host 'x')",
		1 => "CREATE USER MAPPING FOR PUBLIC SERVER statbuffer OPTIONS (user 'x')",
		1 => "ALTER FOREIGN DATA WRAPPER statbuffer OPTIONS (ADD a 'x')",
		1 => "TRUNCATE v_text");
}

my @handlers = qw(take take_one public.take no_such rude returns_int ambiguous a_procedure an_aggregate lag
  many_rows variadic_take default_take not_mine forbidden);

sub option
{
	my $name = pick(qw(handler interval jitter timeout backoff restart shutdown batch_size handler_timeout stopped
		  nonsense Handler));
	my $value = draw(
		12 => sub { pick('0', '1', '10ms', '50ms', '1s', '1min', '1h', '2147483647', '24d', '100000') },
		3 => sub { pick('', '-1', 'x', '1 parsec', '2147483648', '1e30', 'NaN', '0x10', ' 5 s ', '5s;') },
		3 => sub { pick(@handlers, 'a.b.c.d', '"', 'take()', 'x' x 100) },
		2 => sub { pick('transient', 'temporary', 'TEMPORARY') },
		2 => sub { pick('true', 'false', 'off', 'maybe') });

	return ($name, $value);
}

# Options that are mostly in range, with short times
sub mild_option
{
	return draw(
		4 => sub { ('interval', pick('0', '10ms', '100ms', '1s')) },
		2 => sub { ('jitter', pick('0', '10ms')) },
		3 => sub { ('timeout', pick('0', '100ms', '1s')) },
		2 => sub { ('backoff', pick('1', '10ms', '1s')) },
		2 => sub { ('batch_size', pick(1, 2, 10, 100000)) },
		2 => sub { ('restart', pick('transient', 'temporary')) },
		1 => sub { ('shutdown', pick('0', '50ms')) },
		2 => sub { ('handler_timeout', pick('0', '10ms', '1s')) });
}

sub column_type
{
	return pick(@types) if chance(70);
	return pick(qw(text bigint int8 record anyelement void no_such serial));
}

sub set_option
{
	my ($name, $value) = draw(
		12 => \&mild_option,
		7 => \&option,
		1 => sub { ('handler', pick(@handlers, ('take') x 10)) });

	return draw(
		5 => "SET $name '$value'",
		5 => "ADD $name '$value'",
		1 => "DROP $name",
		1 => "$name '$value', $name '$value'");
}

sub alteration
{
	my ($b) = @_;
	my $type = column_type();

	return "ALTER FOREIGN TABLE $b " . draw(
		8 => sub { 'OPTIONS (' . set_option() . ')' },
		3 => "ADD COLUMN c $type",
		2 => sub { "ADD COLUMN c $type NOT NULL DEFAULT " . any_value() },
		1 => sub { 'ADD COLUMN g bigint GENERATED ALWAYS AS (n * 2) STORED' },
		1 => 'ADD COLUMN i bigint GENERATED BY DEFAULT AS IDENTITY',
		3 => 'DROP COLUMN c',
		1 => 'DROP COLUMN IF EXISTS g',
		1 => 'DROP COLUMN key CASCADE',
		1 => 'DROP COLUMN n CASCADE',
		2 => "ALTER COLUMN key TYPE $type",
		1 => 'ALTER COLUMN key TYPE text',
		1 => 'ALTER COLUMN n TYPE bigint',
		1 => 'ALTER COLUMN n TYPE int',
		2 => 'ALTER COLUMN key SET NOT NULL',
		2 => 'ALTER COLUMN key DROP NOT NULL',
		1 => sub { 'ALTER COLUMN key SET DEFAULT ' . any_value() },
		1 => 'ALTER COLUMN n SET DEFAULT sb_count(\'x\', \'b_text\')',
		1 => 'ALTER COLUMN n DROP DEFAULT',
		2 => sub { 'ALTER COLUMN key SET STORAGE ' . pick(qw(PLAIN MAIN EXTERNAL EXTENDED)) },
		1 => 'ALTER COLUMN key SET STATISTICS 10',
		1 => 'ALTER COLUMN key OPTIONS (x \'y\')',
		1 => 'ALTER COLUMN c SET (n_distinct = 5)',
		2 => 'RENAME COLUMN c TO d',
		2 => 'RENAME COLUMN d TO c',
		1 => "RENAME TO ${b}_x",
		1 => 'ADD CHECK (n < 5)',
		1 => 'ADD CONSTRAINT counting CHECK (counting(\'check\') IS NOT NULL)',
		1 => 'DROP CONSTRAINT IF EXISTS counting',
		1 => sub { 'OWNER TO ' . pick('fuzz_owner', 'SESSION_USER', 'fuzz_nologin') },
		1 => 'INHERIT s_parent',
		1 => 'NO INHERIT s_parent',
		1 => 'DISABLE TRIGGER ALL',
		1 => 'SET SCHEMA other',
		1 => 'SET WITHOUT OIDS');
}

# Definitions that come and go
sub definition
{
	my $b = pick(@free);
	my $k = chance(50) ? named('k', pick(@types)) : $b;
	my $column = sub { (chance(80) ? pick(qw(key a b c)) : 'key') . ' ' . column_type() . (chance(30) ? ' NOT NULL' : '') };

	return draw(
		14 => sub { alteration($k) },
		4 => sub { alteration(pick(@rude)) },
		3 => sub { alteration(pick(@odd_buffers)) },
		3 => sub {
			my ($name, $value) = mild_option();
			'ALTER FOREIGN TABLE ' . named('b', pick(@fit_types)) . " OPTIONS (" . pick('ADD', 'SET') . " $name '$value')";
		},
		14 => sub {
			my ($name, $value) = chance(80) ? mild_option() : option();
			"CREATE FOREIGN TABLE IF NOT EXISTS $b (" . $column->() . ", n bigint" . (chance(50) ? ' DEFAULT 1' : '')
			  . ") SERVER statbuffer OPTIONS ($name '$value'" . (chance(70) && $name ne 'handler' ? ", handler 'take'" : '') . ')';
		},
		2 => sub {
			"CREATE FOREIGN TABLE IF NOT EXISTS $b (" . join(', ', map { "k$_ " . column_type() } 1 .. number(0, 4))
			  . ') SERVER statbuffer';
		},
		1 => "CREATE FOREIGN TABLE IF NOT EXISTS pg_temp.$b (key text, n bigint DEFAULT 1)"
		  . " SERVER statbuffer OPTIONS (handler 'take', interval '0')",
		4 => "DROP FOREIGN TABLE IF EXISTS $b",
		1 => "DROP FOREIGN TABLE IF EXISTS $b, ${b}_x, other.$b CASCADE",
		2 => "CREATE OR REPLACE TRIGGER t BEFORE INSERT ON $k FOR EACH ROW EXECUTE FUNCTION meddle()",
		1 => "CREATE OR REPLACE TRIGGER u AFTER INSERT ON $k FOR EACH ROW EXECUTE FUNCTION meddle()",
		1 => "CREATE TRIGGER v AFTER INSERT ON $k REFERENCING NEW TABLE AS news FOR EACH STATEMENT EXECUTE FUNCTION meddle()",
		1 => "DROP TRIGGER IF EXISTS t ON $k",
		2 => sub { 'TRUNCATE ' . buffer() },
		1 => sub { 'TRUNCATE ' . buffer() . ', ' . buffer() . ' RESTART IDENTITY CASCADE' },
		1 => 'TRUNCATE s_parent, a_partitioned',
		1 => 'ALTER TYPE shifty ADD ATTRIBUTE c int',
		1 => 'ALTER TYPE shifty DROP ATTRIBUTE c',
		1 => 'ALTER TYPE shifty ALTER ATTRIBUTE a TYPE bigint CASCADE',
		1 => 'ALTER TYPE shifty ALTER ATTRIBUTE a TYPE int CASCADE',
		1 => 'ALTER TABLE holed ADD COLUMN z int',
		1 => 'ALTER TABLE holed DROP COLUMN z',
		1 => 'ALTER TABLE toasted ADD COLUMN z int',
		1 => 'ALTER TABLE toasted DROP COLUMN z',
		1 => 'DROP DOMAIN IF EXISTS fleeting CASCADE',
		2 => 'CREATE DOMAIN fleeting AS int CHECK (VALUE > 0)',
		1 => "ALTER TYPE mood_t ADD VALUE IF NOT EXISTS 'mad'",
		1 => "ALTER TYPE mood_t RENAME VALUE 'sad' TO 'sad'",
		1 => 'ALTER DOMAIN positive DROP CONSTRAINT IF EXISTS small',
		1 => 'ALTER DOMAIN positive ADD CONSTRAINT small CHECK (VALUE < 7)',
		1 => sub { 'DROP FOREIGN TABLE IF EXISTS ' . named('k', 'text') },
		2 => sub { 'GRANT ' . pick('INSERT', 'SELECT', 'ALL', 'SELECT (key)', 'INSERT (key, n)') . " ON $k TO fuzz_writer" },
		1 => sub { 'REVOKE ' . pick('INSERT', 'SELECT', 'ALL', 'SELECT (key)') . " ON $k FROM fuzz_writer, fuzz_owner" },
		1 => "CREATE OR REPLACE FUNCTION fleeting_take(anyelement, bigint) RETURNS void LANGUAGE sql AS ''",
		1 => 'DROP FUNCTION IF EXISTS fleeting_take(anyelement, bigint)');
}

# What the ledger knows of: in one statement, so that both are or both aren't
sub control
{
	my $k = number(1, 200);
	my $n = number(-5, 100);

	return draw(
		10 => "SELECT control('c$k', $n)",
		3 => "SELECT control('c' || g, $n) FROM generate_series($k, $k + 50) AS g",
		4 => "WITH l AS (INSERT INTO ledger SELECT 'c' || g, $n FROM generate_series($k, $k + 20) AS g RETURNING *)"
		  . ' INSERT INTO control SELECT * FROM l',
		2 => "SELECT control('large $k', 1099511627777), control('large $k', -1099511627776)",
		4 => 'SELECT control_async()',
		2 => sub { 'SELECT control(\'c1\', 1), ' . call() },
		2 => "SELECT try('SELECT control(''tried'', 1), 1 / 0', 1), control('c2', 1)",
		1 => "SELECT nest('SELECT control(''nested'', 1)', " . number(1, 80) . ')',
		1 => "CALL in_a_loop('SELECT control(''loop'', 1)', 5)");
}

# Any one statement that a client could send
sub statement
{
	return draw(
		40 => \&query,
		14 => \&insertion,
		14 => \&selection,
		2 => \&refused,
		6 => \&control,
		8 => \&definition,
		4 => sub { 'SELECT try(' . quoted(statement()) . ', ' . number(0, 3) . ')' },
		1 => sub { 'SELECT nest(' . quoted(query()) . ', ' . number(1, 70) . ')' },
		2 => sub { 'SELECT as_owner(' . quoted(query()) . ')' },
		1 => sub { 'CALL in_a_loop(' . quoted(query()) . ', 4)' },
		2 => sub { 'DO ' . quoted('BEGIN PERFORM 1; ' . statement_in_block() . ' END') },
		1 => sub { statement() . '; ' . statement() });
}

sub statement_in_block
{
	return draw(
		2 => sub { 'EXECUTE ' . quoted(statement()) . ';' },
		1 => sub { 'FOR i IN 1 .. 5 LOOP PERFORM ' . call('i') . '; END LOOP;' },
		1 => sub {
			'BEGIN PERFORM ' . call() . "; RAISE 'inner'; EXCEPTION WHEN raise_exception THEN PERFORM " . call() . '; END;';
		});
}

# ------------------------------------------------------------------------
# Units
# ------------------------------------------------------------------------

sub several { my ($least, $most) = @_; return map { simple(statement()) } 1 .. number($least, $most); }

sub transaction
{
	my @messages = simple('BEGIN ' . draw(
		10 => '',
		2 => 'ISOLATION LEVEL SERIALIZABLE',
		2 => 'ISOLATION LEVEL REPEATABLE READ',
		2 => 'READ ONLY',
		1 => 'ISOLATION LEVEL SERIALIZABLE, READ ONLY, DEFERRABLE'));
	my @savepoints;
	my $guarded = chance(60);

	foreach (1 .. number(1, 7))
	{
		if (chance(20))
		{
			push @savepoints, 's' . number(1, 3);
			push @messages, simple("SAVEPOINT $savepoints[-1]");
		}
		push @messages, simple('SAVEPOINT guard') if $guarded;
		push @messages, simple(chance(15) ? control() : statement());
		if ($guarded)
		{
			$messages[-1]{on_error} = 'ROLLBACK TO guard';
			push @messages, simple('RELEASE guard') if chance(50);
		}
		push @messages, simple("ROLLBACK TO $savepoints[-1]") if @savepoints && chance(40);
		push @messages, simple("RELEASE $savepoints[-1]") if @savepoints && chance(15);
		push @messages, simple('SET CONSTRAINTS ALL IMMEDIATE') if chance(2);
	}
	push @messages, simple(draw(10 => 'COMMIT', 4 => 'ROLLBACK', 1 => 'COMMIT AND CHAIN', 1 => "PREPARE TRANSACTION 'p'"));
	if ($messages[-1]{text} =~ /CHAIN/)
	{
		push @messages, several(1, 2), simple('COMMIT');
	}
	elsif ($messages[-1]{text} =~ /PREPARE/)
	{
		push @messages, simple(pick('COMMIT', 'ROLLBACK') . " PREPARED 'p'");
	}
	return @messages;
}

sub prepared
{
	my $b = buffer();
	my $type = $shape{$b} && @{ $shape{$b} } == 1 ? $shape{$b}[0] : 'text';
	my $query = draw(
		3 => "SELECT sb_increment(\$1, \$2, '$b')",
		2 => "INSERT INTO $b VALUES (\$1, \$2)",
		2 => "SELECT * FROM $b WHERE key = \$1 OR n = \$2",
		1 => "SELECT sb_count(\$1, '$b'), \$2",
		1 => "SELECT sb_keys('$b'), \$1, \$2",
		1 => "INSERT INTO $b SELECT \$1, g FROM generate_series(1, \$2 % 20) g");
	my $execute = sub { simple('EXECUTE p (' . value($type) . ', ' . count() . ')') };
	my @messages = (
		simple('PREPARE p' . (chance(50) ? " ($type, bigint)" : '') . " AS $query"),
		(map { $execute->() } 1 .. number(1, 6)));

	push @messages, simple(definition()), $execute->() if chance(40);
	push @messages, simple(alteration($b)), $execute->() if chance(60) && $b !~ /^b_|^control/;
	push @messages, simple('EXPLAIN ANALYZE ' . $execute->()->{text}) if chance(20);
	return (@messages, simple('DEALLOCATE ALL'));
}

sub cursor
{
	my $hold = chance(40);
	my $guarded = chance(50);
	my $query = chance(50) ? selection() : query();
	my @messages = (
		simple('BEGIN'),
		simple('DECLARE c ' . pick('', 'SCROLL', 'NO SCROLL', 'BINARY') . ' CURSOR '
			  . ($hold ? 'WITH HOLD ' : '') . "FOR $query"));

	push @messages, simple('SAVEPOINT guard') if $guarded;
	foreach (1 .. number(1, 5))
	{
		push @messages, simple(draw(
			8 => 'FETCH ' . pick('1', '5', 'ALL', '-1', 'FIRST', 'ABSOLUTE 3', 'RELATIVE 0') . ' FROM c',
			2 => 'MOVE BACKWARD ALL IN c',
			2 => sub { statement() },
			1 => sub { 'TRUNCATE ' . buffer() },
			1 => 'SAVEPOINT s',
			1 => 'ROLLBACK TO s',
			1 => "DELETE FROM b_text WHERE CURRENT OF c"));
		$messages[-1]{on_error} = 'ROLLBACK TO guard' if $guarded;
	}
	push @messages, simple('COMMIT'), simple('FETCH ALL FROM c'), simple('CLOSE ALL') if $hold;
	return (@messages, simple('COMMIT'));
}

# Calls under other settings
sub with_settings
{
	my $setting = draw(
		4 => "work_mem = '64kB'",
		4 => 'force_parallel_mode = ' . pick('on', 'regress'),
		2 => 'parallel_setup_cost = 0; SET parallel_tuple_cost = 0; SET min_parallel_table_scan_size = 0',
		3 => "search_path = ''",
		3 => 'search_path = evil, public',
		2 => 'search_path = pg_temp, other, pg_catalog, public',
		1 => 'search_path = other',
		3 => 'enable_hashjoin = off; SET enable_mergejoin = off; SET enable_material = off',
		2 => 'enable_nestloop = off; SET enable_hashagg = off; SET enable_sort = off',
		2 => 'plan_cache_mode = force_generic_plan',
		2 => "default_transaction_isolation = 'serializable'",
		2 => 'default_transaction_read_only = on',
		1 => 'row_security = off',
		2 => "client_encoding = 'LATIN1'",
		1 => "client_encoding = 'SQL_ASCII'",
		1 => "datestyle = 'German'; SET intervalstyle = 'iso_8601'; SET timezone = 'Asia/Kathmandu'",
		1 => 'extra_float_digits = -15',
		1 => "bytea_output = 'escape'",
		1 => 'session_replication_role = replica',
		1 => 'check_function_bodies = off',
		1 => 'temp_buffers = 100',
		1 => 'max_stack_depth = 100',
		1 => 'lock_timeout = 1',
		1 => 'array_nulls = off',
		1 => 'jit = on; SET jit_above_cost = 0',
		1 => "statbuffer.max_memory = '1GB'",
		1 => "statbuffer.nonsense = '1GB'",

		# where the server was built for it: what is cached is never trusted
		2 => 'debug_discard_caches = 1');

	return (simple("SET $setting"), several(2, 8));
}

sub as_other_role
{
	my $role = pick(qw(fuzz_owner fuzz_writer fuzz_reader fuzz_nobody fuzz_nologin));

	return (simple(pick("SET ROLE $role", "SET SESSION AUTHORIZATION $role")), several(3, 8));
}

sub cut_off
{
	return draw(
		8 => sub { (simple('SET statement_timeout = ' . number(1, 8)), several(4, 10)) },
		2 => sub { simple('SELECT pg_cancel_backend(pg_backend_pid()), ' . call()) },
		1 => sub { simple(query() . '; SELECT pg_terminate_backend(pg_backend_pid())') },
		1 => sub { (simple('BEGIN'), several(1, 3), simple('SELECT pg_terminate_backend(pg_backend_pid())')) },
		1 => sub {
			(simple('SET idle_in_transaction_session_timeout = 1'), simple('BEGIN'), several(1, 2),
				simple('SELECT pg_sleep(0.01)'));
		},
		1 => sub { (simple('BEGIN'), simple(call() =~ s/^/SELECT /r), simple('DISCARD ALL')) },
		1 => sub { (several(1, 2), simple('DISCARD ALL')) });
}

my %oid = (
	text => 25, integer => 23, bigint => 20, bytea => 17, numeric => 1700, uuid => 2950,
	jsonb => 3802, 'integer[]' => 1007, date => 1082, regclass => 2205);

sub random_bytes { return join '', map { chr number(0, 255) } 1 .. pick(0, 1, 2, 4, 8, 8, 12, 40); }

# A parameter in text or binary form, as it should be or any bytes
sub parameter
{
	my ($type) = @_;
	my $value = $type eq 'buffer' ? buffer() : pick(@{ $values{$type} });

	$value = 'x' if $value =~ /^=/;
	return [ draw(4 => 0, 4 => 25, 1 => 705, 1 => 2249, 1 => 2283, 1 => 20, 1 => 4294967295), 0, $value ] if chance(50);
	return [ $oid{$type} // 0, 0, chance(90) ? $value : undef ] if chance(50);
	return [ $oid{$type} // 25, 1, $type eq 'bigint' ? pack('q>', number(-9, 9)) : random_bytes() ];
}

sub by_extended_protocol
{
	my $type = pick(grep { $_ ne 'regclass' } keys %oid);
	my $b = named('b', $type);

	return map {
		draw(
			5 => sub {
				extended("SELECT sb_increment(\$1, \$2, \$3)", 0, parameter($type), parameter('bigint'),
					[ 0, 0, chance(80) ? $b : 'no_such' ]);
			},
			3 => sub { extended("SELECT sb_increment(\$1, \$2, '$b')", 0, parameter($type), parameter('bigint')) },
			3 => sub { extended("INSERT INTO $b VALUES (\$1, \$2)", 0, parameter($type), parameter('bigint')) },
			2 => sub { extended("SELECT sb_count(\$1, '$b')", 0, parameter($type)) },
			2 => sub { extended("SELECT * FROM $b", pick(0, 1, 3)) },
			2 => sub { extended("SELECT * FROM sb_keys(\$1)", pick(0, 1, 3), parameter('buffer')) },
			2 => sub { extended("SELECT sb_flush(\$1, \$2)", 0, parameter($type), [ 2205, 1, random_bytes() ]) },
			1 => sub { extended(query(), pick(0, 1)) },
			1 => sub { extended('SELECT sb_increment($1)', 0) },
			1 => sub { extended(insertion(), pick(0, 2)) })
	} 1 .. number(1, 6);
}

# Functions as clients used to call them, without a query; what kind of
# argument each takes.  Their OIDs are looked up beforehand.
my @by_fast_path = (
	[ 'sb_increment(text,bigint,regclass)', qw(text bigint buffer) ],
	[ 'sb_increment(anynonarray,bigint,regclass)', qw(text bigint buffer) ],
	[ 'sb_async_increment(text,bigint,regclass)', qw(text bigint buffer) ],
	[ 'sb_async_increment(anynonarray,bigint,regclass)', qw(text bigint buffer) ],
	[ 'sb_count(text,regclass)', qw(text buffer) ],
	[ 'sb_count(anynonarray,regclass)', qw(text buffer) ],
	[ 'sb_flush(text,regclass)', qw(text buffer) ],
	[ 'sb_flush_all(regclass)', qw(buffer) ],
	[ 'sb_keys(regclass)', qw(buffer) ],
	[ 'sb_start(regclass)', qw(buffer) ],
	[ 'sb_stat_reset(regclass)', qw(buffer) ],
	[ 'sb_stat_get_buffer(oid)', qw(buffer) ],
	[ 'statbuffer_fdw_handler()' ],
	[ 'statbuffer_fdw_validator(text[],oid)', qw(text bigint) ]);

our %function_oid;

sub by_fast_path
{
	return map {
		my ($signature, @kinds) = @{ pick(@by_fast_path) };

		fast_path($function_oid{$signature} // 0, map {
			chance(8) ? [ 0, undef ]
			  : chance(15) ? [ 1, random_bytes() ]
			  : $_ eq 'text' ? [ 0, 'x' x pick(1, 100, 2000) ]
			  : $_ eq 'bigint' ? [ 0, count() =~ s/'//gr ]
			  : [ 0, named('b', pick(@fit_types)) ]
		} @kinds)
	} 1 .. number(1, 5);
}

sub copying
{
	my $b = chance(50) ? named('b', pick('text', 'integer', 'numeric')) : buffer();
	my $data = draw(
		6 => sub { join '', map { "$_\t$_\n" } 1 .. number(0, 100) },
		1 => "x\n",
		1 => "\\N\t\\N\n",
		1 => "a\tb\tc\n",
		1 => "a\t1\n\\.\n",
		1 => "\xe9\t1\n",
		1 => ('y' x 3000) . "\t1\n");

	return draw(
		6 => sub { copy_in("COPY $b FROM STDIN", $data) },
		2 => sub { copy_in("COPY $b (n, key) FROM STDIN WITH (FORMAT csv, DELIMITER E'\\t')", $data) },
		1 => sub { copy_in("COPY $b FROM STDIN WHERE n > 3", $data) },
		1 => sub { copy_in("COPY $b FROM STDIN (FREEZE)", $data) },
		1 => sub { copy_in("COPY $b FROM STDIN (FORMAT binary)", "PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0" . random_bytes()) },
		1 => sub { copy_in("COPY a_partitioned FROM STDIN", "x\t1\ny\t2\nz\t3\n") },
		1 => sub { simple("COPY $b FROM STDIN") },
		1 => sub { simple("COPY $b TO STDOUT") },
		2 => sub { simple("COPY (SELECT * FROM $b) TO STDOUT") });
}

# What is there to be called by PostgreSQL itself
sub internals
{
	my $catalog = pick('1259', '2328', '1417', '1418', '3118', '0', "'pg_foreign_table'::regclass", 'NULL');

	return map {
		simple(draw(
			3 => sub { my ($name, $value) = option(); "SELECT statbuffer_fdw_validator(ARRAY['$name=$value'], $catalog)" },
			3 => 'SELECT statbuffer_fdw_validator(' . pick(
				"'{}'", "'{{a=1,b=2},{c=3,d=4}}'", 'ARRAY[NULL]::text[]', "ARRAY['=']", "ARRAY['handler']",
				"ARRAY['interval=']", "ARRAY['handler=' || repeat('x.', 10000)]", "ARRAY[repeat('x', 100000)]",
				"'[5:6]={interval=1,interval=x}'", 'NULL') . ", $catalog)",
			1 => 'SELECT statbuffer_fdw_handler()',
			2 => 'SELECT sb_stat_get_buffer(oid) FROM pg_class',
			1 => 'SELECT sb_stat_get_buffer(' . pick('0', 'NULL', '4294967295', '-1') . ')',
			1 => 'SELECT (sb_stat_get_buffer(oid)).* FROM pg_class WHERE relkind = \'f\'',
			1 => 'SELECT sb_increment(oid, 1, oid::regclass) FROM pg_class WHERE relkind = \'r\'',
			1 => 'SELECT sb_keys(oid::regclass) FROM pg_class WHERE relkind = \'f\' AND relname LIKE \'b%\'',
			1 => 'SELECT try(format(\'SELECT sb_count(NULL, %s::regclass)\', oid), 0) FROM pg_class',
			1 => 'SELECT try(format(\'SELECT count(*) FROM sb_keys(%s::regclass)\', oid), 0) FROM pg_class WHERE relkind = \'f\'',
			1 => 'SELECT try(format(\'SELECT sb_flush_all(%s::regclass)\', oid), 0) FROM pg_class WHERE relkind = \'f\''))
	} 1 .. number(1, 3);
}

# The default buffer, which others may be using
sub default_buffer
{
	return (
		simple('SELECT sb_start()'),
		simple(pick("SELECT sb_increment('mykey')", 'SELECT sb_increment(1)', "SELECT sb_increment('mykey', 10), sb_count('mykey')")),
		(chance(30) ? simple('SELECT sb_stop()') : ()),
		(chance(30) ? simple('DROP FOREIGN TABLE IF EXISTS sb_default') : ()),
		(chance(10) ? simple('DROP FUNCTION IF EXISTS handle_flush(text, bigint)') : ()),
		(chance(20)
			? simple("CREATE OR REPLACE FUNCTION handle_flush(key text, counter bigint) RETURNS void LANGUAGE sql AS ''")
			: ()));
}

# Counted, altered, truncated and dropped in the same transaction
sub altered_within
{
	my $name = draw(
		4 => sub { named('k', pick(@types)) },
		2 => sub { pick(@odd_buffers) },
		2 => sub { pick(@rude) },
		1 => sub { pick(@free) });
	my $row = sub {
		my $shape = $shape{$name} || ['text'];

		return @$shape > 20 ? 'NULL, NULL' : join ', ', (map { value($_) } @$shape), '1';
	};
	my @messages = simple('BEGIN');

	foreach (1 .. number(2, 9))
	{
		push @messages, simple('SAVEPOINT guard');
		push @messages, simple(draw(
			5 => sub { "INSERT INTO $name VALUES (" . $row->() . ')' },
			2 => sub { 'SELECT sb_increment(' . key($name) . ", 1, '$name')" },
			2 => sub { 'SELECT sb_async_increment(' . key($name) . ", 1, '$name')" },
			1 => sub { 'SELECT sb_count(' . key($name) . ", '$name')" },
			1 => "SELECT * FROM $name",
			1 => "SELECT * FROM sb_keys('$name')",
			4 => sub { alteration($name) },
			1 => "ALTER FOREIGN TABLE $name OWNER TO fuzz_owner",
			1 => "ALTER FOREIGN TABLE $name OWNER TO SESSION_USER",
			2 => "TRUNCATE $name",
			1 => "DROP FOREIGN TABLE $name",
			1 => "SELECT sb_start('$name')",
			1 => "SELECT sb_stop('$name')",
			1 => "SELECT sb_flush_all('$name')",
			1 => sub { control() }));
		$messages[-1]{on_error} = 'ROLLBACK TO guard';
		push @messages, simple('ROLLBACK TO guard') if chance(15);
		push @messages, simple('RELEASE guard') if chance(40);
	}
	return (@messages,
		simple(draw(8 => 'COMMIT', 2 => 'ROLLBACK', 1 => "PREPARE TRANSACTION 'p'")),
		simple("ROLLBACK PREPARED 'p'"));
}

# So many, or so large, that tables grow and scans take several blocks
sub many_keys
{
	my $b = pick('b_text', 'k_text', 'k_varchar', 'b_bytea', 's_plain', pick(@free));
	my $value = $b =~ /bytea/ ? "decode(md5('r' || g), 'hex')"
	  : pick("'many ' || g", "rpad('long ' || g, " . number(10, 1990) . ')');

	return (
		simple("INSERT INTO $b SELECT $value, 1 FROM generate_series(1, " . number(1000, 3000) . ') AS g'),
		simple("SELECT count(*), sum(n) FROM $b"),
		simple(pick("SELECT sb_flush_all('$b')", "SELECT sb_drain('$b', '1s')", "TRUNCATE $b")));
}

# More shapes than a buffer remembers
sub many_shapes
{
	my $b = 'f_' . number(1, 6);
	my @messages = simple("CREATE FOREIGN TABLE IF NOT EXISTS $b (key text, n bigint)"
		  . " SERVER statbuffer OPTIONS (handler 'take', interval '1h')");

	foreach my $type (map { pick(@types) } 1 .. 60)
	{
		push @messages, simple("ALTER FOREIGN TABLE $b ALTER key TYPE $type"),
		  simple("INSERT INTO $b VALUES (" . value($type) . ', 1)');
	}
	return (@messages, simple("SELECT * FROM $b"), simple(pick("TRUNCATE $b", "DROP FOREIGN TABLE $b")));
}

# Keys that are equal, and each of which has as much as there can be
sub equal_keys
{
	my ($type, @keys) = @{ pick([ 'numeric', '1.0', '1.00' ], [ 'interval', '1 month', '30 days' ], [ 'real', '0', '-0' ]) };
	my $n = pick('2305843009213693952', '-2305843009213693952', '2305843009213693000', '9223372036854775807');

	return (
		simple('SELECT ' . join(', ', map { "sb_increment('$_'::$type, $n, 'b_$type')" } @keys)),
		simple("SELECT sb_flush_all('b_$type')"),
		simple("SELECT * FROM sb_keys('b_$type')"),
		simple("SELECT sum(n), count(*) FROM b_$type"));
}

# ------------------------------------------------------------------------
# A model: what a session should see of a buffer that only it counts in and
# that is not flushed, as long as nothing fails that is not meant to.
# ------------------------------------------------------------------------

# Buffers of clients: as many as there are of these
our $client = 0;

# How often a key is counted when nest() has it counted so deep: a level in
# which the one below fails counts nothing.
sub nested_count
{
	my ($depth) = @_;

	return 1 if $depth == 0;
	return ($depth - 1) % 7 == 3 ? 0 : nested_count($depth - 1) + 1;
}

sub modelled
{
	my $b = "m_$client";
	my @keys = map { "m$_" } 1 .. 3;
	my %published;
	my @levels;    # of the transaction: [savepoint, truncated, { key => count }]
	my $visible = sub {
		my ($key) = @_;
		my $sum = 0;

		# a transaction that has truncated sees only what it has counted since
		foreach my $level (reverse @levels)
		{
			$sum += $level->[2]{$key} // 0;
			return $sum if $level->[1];
		}
		return $sum + ($published{$key} // 0);
	};
	my $add = sub {
		my ($key, $n) = @_;

		if (@levels) { $levels[-1][2]{$key} += $n; }
		else { $published{$key} += $n; }
	};

	# what is in a level goes to the one above it, or is published
	my $merge = sub {
		my (undef, $truncated, $counts) = @{ pop @levels };

		if ($truncated && @levels) { $levels[-1] = [ $levels[-1][0], 1, {} ]; }
		elsif ($truncated) { %published = (); }
		$add->($_, $counts->{$_}) foreach keys %$counts;
	};
	my @messages = (simple('ROLLBACK'), simple("TRUNCATE $b"));
	my $say = sub { push @messages, simple($_[0]); return $messages[-1]; };

	foreach (1 .. number(10, 40))
	{
		my $key = pick(@keys);
		my $n = pick(1, 2, 10, -3, 0, 1 << 41);

		draw(
			8 => sub {
				$say->(pick("SELECT sb_increment('$key', $n, '$b')", "INSERT INTO $b VALUES ('$key', $n)",
					"SELECT try('SELECT sb_increment(''$key'', $n, ''$b'')', 0)", "INSERT INTO v_$b VALUES ('$key', $n)"));
				$add->($key, $n);
			},
			2 => sub {
				my $times = number(1, 200);

				$say->(pick("SELECT sb_increment('$key', $n, '$b') FROM generate_series(1, $times)",
					"INSERT INTO $b SELECT '$key', $n FROM generate_series(1, $times)"));
				$add->($key, $n * $times);
			},
			1 => sub {
				push @messages, copy_in("COPY $b FROM STDIN", "$key\t$n\n$key\t1\n");
				$add->($key, $n + 1);
			},
			2 => sub {
				$say->("SELECT sb_async_increment('$key', $n, '$b')");
				$published{$key} += $n;
			},
			1 => sub { $say->("SELECT try('SELECT sb_increment(''$key'', 7, ''$b''), 1 / 0', " . number(0, 3) . ')') },
			2 => sub {
				my $depth = pick(grep { $_ % 7 != 3 } 1 .. 20);

				$say->("SELECT nest('SELECT sb_increment(''$key'', $n, ''$b'')', $depth)");
				$add->($key, $n * nested_count($depth));
			},
			1 => sub {
				return if @levels;
				$say->("CALL in_a_loop('SELECT sb_increment(''$key'', $n, ''$b'')', 5)");
				$add->($key, 3 * $n);
			},
			1 => sub { $say->("SELECT sb_increment('$key', 7, '$b'), 1 / 0")->{may_fail} = 1 if !@levels; },
			1 => sub {
				$say->(pick("SELECT sb_flush_all('$b')", "SELECT sb_flush('$key', '$b')",
					"ALTER FOREIGN TABLE $b OPTIONS (SET interval '1d')"));
			},
			3 => sub {
				return if @levels;
				$say->('BEGIN' . pick('', '', ' ISOLATION LEVEL SERIALIZABLE'));
				@levels = ([ '', 0, {} ]);
			},
			4 => sub {
				return if !@levels;
				push @levels, [ 's' . @levels, 0, {} ];
				$say->("SAVEPOINT $levels[-1][0]");
			},
			3 => sub {
				return if @levels < 2;
				my $to = number(1, $#levels);

				$say->("ROLLBACK TO $levels[$to][0]");
				splice @levels, $to + 1;
				$levels[$to] = [ $levels[$to][0], 0, {} ];
			},
			2 => sub {
				return if @levels < 2;
				my $to = number(1, $#levels);

				$say->("RELEASE $levels[$to][0]");
				$merge->() while $#levels >= $to;
			},
			2 => sub {
				return if !@levels;
				if (chance(70))
				{
					$say->('COMMIT');
					$merge->() while @levels;
				}
				else
				{
					$say->('ROLLBACK');
					@levels = ();
				}
			},
			1 => sub {
				$say->("TRUNCATE $b");
				if (@levels) { $levels[-1] = [ $levels[-1][0], 1, {} ]; }
				else { %published = (); }
			},
			6 => sub { $say->("SELECT coalesce(sb_count('$key', '$b'), 0)")->{expect} = $visible->($key); },
			4 => sub {
				$say->("SELECT coalesce(string_agg(key || '=' || n, ' ' ORDER BY key), '') FROM $b")->{expect} =
				  join ' ', map { "$_=" . $visible->($_) } grep { $visible->($_) != 0 } @keys;
			});
	}
	$say->('COMMIT');
	return @messages;
}

# What was altered or dropped is made as it was.
sub remade
{
	my $name = draw(
		3 => sub { named('k', pick(@types)) },
		3 => sub { pick(@odd_buffers) },
		2 => sub { pick(@rude) });

	return map { simple($_) } "DROP FOREIGN TABLE IF EXISTS $name, ${name}_x, other.$name CASCADE", definitions($name);
}

# Made, used and dropped in the same transaction
sub short_lived
{
	my $type = pick(@types);
	my $end = pick('COMMIT', 'ROLLBACK');
	my $name = 'l_' . number(1, 3);

	return (
		simple('BEGIN'),
		simple("CREATE FOREIGN TABLE $name (key $type, n bigint DEFAULT 1)"
			  . " SERVER statbuffer OPTIONS (handler 'take', interval '0')"),
		simple("INSERT INTO $name VALUES (" . value($type) . ", 1)"),
		(chance(50) ? simple("SELECT sb_async_increment(" . value($type) . ", 1, '$name')") : ()),
		(chance(30) ? simple("TRUNCATE $name") : ()),
		(chance(30) ? simple(alteration($name)) : ()),
		(chance(30) ? simple("SELECT sb_drain('$name', '10ms')") : ()),
		(chance(30) ? (simple('SAVEPOINT s'), simple("DROP FOREIGN TABLE $name"), simple('ROLLBACK TO s')) : ()),
		simple("SELECT * FROM $name"),
		(chance(50) ? simple("DROP FOREIGN TABLE $name") : ()),
		simple($end),
		simple("SELECT sb_count(" . value($type) . ", '$name')"),
		simple("DROP FOREIGN TABLE IF EXISTS $name"));
}

# ------------------------------------------------------------------------
# Definitions that change between two calls of one statement: the functions
# named d_* alter what they are called in.  See fuzz_ddl.sql.
# ------------------------------------------------------------------------

my @struck = qw(d_pair d_single d_composite d_checked d_sorted d_mixed);

sub struck_row_of { return "d_row_of('" . pick(qw(d_row d_row d_second pg_temp.d_temp other.d_else d_row_domain)) . "')"; }

sub struck_key
{
	return draw(
		12 => \&struck_row_of,
		3 => 'ROW(d_text(), d_number())',
		2 => "ROW(ROW('k')::d_source, ROW('7')::d_source)",
		2 => "ROW('k')::d_source",
		2 => 'd_named()',
		2 => 'd_text()',
		2 => "'k' || g",
		2 => 'g',
		1 => "ROW('k' || g)::d_source::text",
		1 => "'(7,7)'",
		1 => "'sad'::d_enum",
		1 => "ROW(jsonb_populate_record(NULL::d_row, '{\"a\": 7, \"b\": 7}'), 'sad'::d_enum)",
		1 => "'k'::d_domain",
		1 => "('k' || g)::text::d_ordered",
		1 => "(7,7)::text::d_row_domain",
		1 => "NULL::d_row",
		1 => sub { value(pick(@types)) });
}

sub struck_call
{
	my $b = pick(@struck);
	my $key = struck_key();

	return draw(
		10 => sub { "sb_increment($key, " . number(-3, 9) . ", '$b')" },
		3 => sub { "sb_async_increment($key, " . number(-3, 9) . ", '$b')" },
		3 => "sb_count($key, '$b')",
		1 => "sb_flush($key, '$b')",
		1 => "sb_increment($key, d_number(), '$b')",
		1 => "sb_increment(d_text(), d_number(), '$b'), sb_count($key, '$b')");
}

# The values of a row of one of the buffers, which may have changed
my %struck_row = (
	d_pair => [ 'd_text(), d_number()', "ROW('k')::d_source, ROW('k' || g)::d_source", "'k' || g, g" ],
	d_single => [ 'd_text()', "ROW('k')::d_source", "'k' || g" ],
	d_composite => [ "jsonb_populate_record(NULL::d_row, '{\"a\": 7, \"b\": 7}')", 'd_named()', 'ROW(d_text(), g)::d_row' ],
	d_checked => [ 'd_text()', "'k' || g", "('k' || g)::d_domain" ],
	d_sorted => [ "('k' || g % 5)::text::d_ordered", 'd_text()::d_ordered' ],
	d_mixed => [ "ROW('k', g)::d_row_domain, 'sad'::d_enum", "ROW(d_text(), g)::d_row, 'glad'" ]);

sub struck_query
{
	my $call = struck_call();
	my $other = struck_call();
	my $b = pick(@struck);
	my $c = pick(@struck);
	my $row = pick(@{ $struck_row{$b} });
	my $many = 'generate_series(1, ' . pick(2, 5, 20) . ') AS g';
	my $percent = pick('10', '40', '100', "40, NULL, '$b'", "40, 'd_row'");

	return draw(
		10 => "SELECT $call FROM $many",
		8 => "SELECT $call, d_strike($percent) FROM $many",
		4 => "SELECT $call, $other FROM $many",
		3 => "SELECT $call FROM $many WHERE d_strike($percent) IS NOT NULL",
		2 => "SELECT count(*) FROM (SELECT $call OFFSET 0) s, $many",
		6 => "INSERT INTO $b SELECT $row, g FROM $many",
		4 => "INSERT INTO $b SELECT $row, d_number() FROM $many RETURNING *, d_strike($percent)",
		2 => "INSERT INTO d_single (n) SELECT g FROM $many",
		2 => 'INSERT INTO d_single DEFAULT VALUES',
		1 => "INSERT INTO $b SELECT * FROM $c",
		3 => "INSERT INTO d_liked SELECT ROW('k' || g)::d_source, ROW('7')::d_source, 'x' FROM $many",
		1 => "INSERT INTO d_liked SELECT d_text(), d_number(), 'x' FROM $many",
		2 => "UPDATE d_liked SET a = ROW('u')::d_source, b = ROW('8')::d_source",
		1 => "UPDATE d_liked SET other = d_text()",
		1 => 'DELETE FROM d_liked',
		4 => "SELECT x.*, d_strike($percent) FROM $b x",
		2 => "SELECT x::text, d_strike($percent) FROM $b x",
		2 => "SELECT x.*, y.*, d_strike(10) FROM $b x, $c y LIMIT 100",
		1 => "SELECT * FROM $b x WHERE d_strike($percent) IS NOT NULL ORDER BY a",
		1 => "SELECT DISTINCT a FROM $b WHERE d_strike(20) IS NOT NULL",
		2 => "SELECT k.*, d_strike($percent) FROM sb_keys('$b') k",
		1 => "SELECT sb_keys('$b'), d_strike($percent) FROM $many",
		2 => "SELECT *, d_strike(10) FROM sb_stat_buffers WHERE buffer::text ~ 'd_'",
		1 => "SELECT sb_drain('$b', '50ms')",
		2 => "SELECT sb_flush_all('$b')",
		2 => "WITH i AS (INSERT INTO $b SELECT $row, g FROM $many RETURNING *) SELECT i, $call FROM i, generate_series(1, 2) AS g");
}

sub struck_loop
{
	my $call = struck_call() =~ s/\bg\b/i/gr;
	my $other = struck_call() =~ s/\bg\b/i/gr;
	my $b = pick(@struck);
	my $row = pick(@{ $struck_row{$b} }) =~ s/\bg\b/i/gr;

	return 'DO ' . quoted('DECLARE r record; i int := 1; c refcursor; BEGIN ' . draw(
		4 => "FOR i IN 1 .. 10 LOOP PERFORM $call; PERFORM d_strike(50); END LOOP;",
		2 => "FOR i IN 1 .. 10 LOOP BEGIN PERFORM $call; PERFORM d_strike(50); EXCEPTION"
		  . ' WHEN internal_error THEN RAISE; WHEN OTHERS THEN NULL; END; END LOOP;',
		2 => "FOR i IN 1 .. 10 LOOP BEGIN INSERT INTO $b SELECT $row, 1; PERFORM d_strike(50); EXCEPTION"
		  . ' WHEN internal_error THEN RAISE; WHEN OTHERS THEN NULL; END; END LOOP;',
		3 => "FOR r IN SELECT * FROM $b LOOP PERFORM d_strike(50); PERFORM $call; END LOOP;",
		2 => "FOR r IN SELECT $call FROM generate_series(1, 120) AS i LOOP PERFORM d_strike(20); END LOOP;",
		2 => "FOR r IN SELECT k.* FROM sb_keys('$b') k LOOP PERFORM d_strike(50); END LOOP;",
		2 => "OPEN c FOR SELECT $call, $other FROM generate_series(1, 20) AS i;"
		  . ' FOR i IN 1 .. 10 LOOP FETCH c INTO r; PERFORM d_strike(60); END LOOP; CLOSE c;',
		1 => "OPEN c FOR SELECT * FROM $b;"
		  . ' FOR i IN 1 .. 10 LOOP FETCH c INTO r; PERFORM d_strike(60); END LOOP; CLOSE c;') . ' END');
}

# In one statement with the ledger, so that both are or both aren't
sub struck_control
{
	my $l = "WITH l AS (INSERT INTO ledger SELECT 'rows', g FROM generate_series(1, " . number(1, 9) . ') g RETURNING n)';

	return draw(
		6 => sub { "$l SELECT sb_increment(" . struck_row_of() . ", n, 'b_rows') FROM l" },
		2 => "$l SELECT sb_increment(ROW(ROW('k')::d_source, ROW('7')::d_source), n, 'b_rows'), d_strike(40) FROM l",
		2 => "$l SELECT sb_increment(ROW(d_text(), d_number()), n, 'b_rows') FROM l",
		2 => "$l SELECT sb_increment(d_named(), n, 'b_rows') FROM l",
		3 => "$l INSERT INTO b_rows SELECT d_text(), d_number(), n FROM l",
		1 => "$l INSERT INTO b_rows SELECT ROW('k')::d_source, ROW('7')::d_source, n FROM l",
		1 => "$l INSERT INTO b_rows SELECT 'k', d_number(), n FROM l RETURNING d_strike(40), *");
}

sub struck_statement
{
	return draw(
		30 => \&struck_query,
		8 => \&struck_loop,
		8 => \&struck_control,
		2 => 'SELECT d_strike(100)',
		2 => 'SELECT d_make()',
		1 => 'SELECT d_remake()',
		1 => sub { 'SELECT try(' . quoted(struck_query()) . ', ' . number(0, 2) . ')' },
		1 => sub { 'SELECT nest(' . quoted(struck_query()) . ', ' . number(1, 9) . ')' });
}

sub struck_several { return map { simple(struck_statement()) } 1 .. number(2, 8); }

sub struck_transaction
{
	my @messages = simple('BEGIN');

	foreach (1 .. number(2, 7))
	{
		push @messages, simple('SAVEPOINT guard'), simple(struck_statement());
		$messages[-1]{on_error} = 'ROLLBACK TO guard';
		push @messages, simple('ROLLBACK TO guard') if chance(15);
	}
	return (@messages, simple(pick('COMMIT', 'COMMIT', 'ROLLBACK')));
}

# Not WITH HOLD: an exception that is caught during COMMIT, while such a cursor's
# rows are fetched, fails an assertion of PostgreSQL's own (xact.c).
sub struck_cursor
{
	my @messages = (simple('BEGIN'), simple('DECLARE c CURSOR FOR ' . draw(
		3 => sub { 'SELECT ' . struck_call() . ' FROM generate_series(1, 50) AS g' },
		1 => sub { 'SELECT * FROM ' . pick(@struck) },
		1 => sub { 'SELECT * FROM sb_keys(' . quoted(pick(@struck)) . ')' })));

	foreach (1 .. number(2, 6))
	{
		push @messages, map { simple('SAVEPOINT guard'), { %{ simple($_) }, on_error => 'ROLLBACK TO guard' } }
		  'FETCH ' . number(1, 3) . ' FROM c', draw(4 => 'SELECT d_strike(100)', 1 => \&struck_statement);
	}
	return (@messages, simple(pick('COMMIT', 'COMMIT', 'ROLLBACK')));
}

sub struck_prepared
{
	return (
		simple('PREPARE p AS ' . draw(4 => \&struck_query, 1 => \&struck_control)),
		(map { (simple('EXECUTE p'), simple(chance(70) ? 'SELECT d_strike(100)' : struck_statement())) } 1 .. number(1, 6)),
		simple('DEALLOCATE ALL'));
}

sub struck_copy
{
	my $b = pick(@struck);
	my $keys = $b =~ /pair|mixed/ ? 2 : 1;
	my $data = join '', map { join("\t", (pick('7', 'sad', '(7,7)', '\\N')) x $keys, $_) . "\n" } 1 .. number(1, 20);

	return draw(3 => sub { copy_in("COPY $b FROM STDIN", $data) }, 1 => sub { simple("COPY (SELECT * FROM $b) TO STDOUT") });
}

# A statement for each row that is fetched
sub struck_by_extended_protocol { return map { extended(struck_query(), pick(0, 1, 2)) } 1 .. number(1, 4); }

sub struck_unit
{
	my @messages = draw(
		10 => \&struck_several,
		6 => \&struck_transaction,
		5 => \&struck_cursor,
		4 => \&struck_prepared,
		2 => sub { map { struck_copy() } 1 .. number(1, 3) },
		2 => \&struck_by_extended_protocol);

	unshift @messages, simple('SET ROLE ' . pick('fuzz_owner', 'fuzz_writer', 'fuzz_writer')) if chance(40);
	unshift @messages, simple('SET plan_cache_mode = force_generic_plan') if chance(20);
	unshift @messages, simple('SET debug_discard_caches = 1') if chance(2);
	return (simple(chance(20) ? 'SELECT d_remake()' : 'SELECT d_make()'), @messages);
}

# The messages of a unit
sub unit
{
	my ($seed, $number) = @_;

	seed_with($seed, $number);
	return struck_unit() if $ddl && chance(85);
	return draw(
		30 => sub { several(3, 10) },
		16 => \&transaction,
		8 => sub { map { simple(control()) } 1 .. number(1, 4) },
		7 => sub { map { simple(definition()) } 1 .. number(1, 4) },
		6 => \&prepared,
		6 => \&cursor,
		8 => \&with_settings,
		6 => \&as_other_role,
		5 => \&cut_off,
		6 => \&by_extended_protocol,
		4 => \&by_fast_path,
		5 => \&copying,
		2 => \&internals,
		2 => \&default_buffer,
		3 => \&short_lived,
		6 => \&altered_within,
		1 => \&many_keys,
		1 => \&equal_keys,
		0.3 => \&many_shapes,
		8 => \&modelled,
		4 => \&remade);
}

# One that leaves everything as it was but for what is counted, so that it can
# be repeated
sub steady_unit
{
	my ($seed, $number) = @_;

	seed_with($seed, 'steady', $number);
	return draw(
		10 => sub {
			map { simple(draw(10 => \&query, 4 => \&insertion, 4 => \&selection, 1 => \&refused, 2 => \&control)) }
			  1 .. number(1, 4);
		},
		2 => sub { (simple('BEGIN'), (map { simple(query()) } 1 .. number(1, 4)), simple(pick('COMMIT', 'ROLLBACK'))) },
		1 => sub { simple('SELECT try(' . quoted(query()) . ', 2)') },
		1 => \&by_extended_protocol,
		1 => \&by_fast_path,
		1 => \&copying,
		1 => \&internals);
}

# ------------------------------------------------------------------------
# The world
# ------------------------------------------------------------------------

sub roles
{
	return q{
CREATE ROLE fuzz_owner LOGIN;
CREATE ROLE fuzz_writer LOGIN;
CREATE ROLE fuzz_reader LOGIN;
CREATE ROLE fuzz_nobody LOGIN;
CREATE ROLE fuzz_nologin;
GRANT fuzz_nologin TO fuzz_owner;
GRANT fuzz_reader TO fuzz_writer;
};
}

# What there is besides the buffers: statements to run before they are made,
# and after.
sub surroundings
{
	return split /^-- what needs the buffers\n/m, slurp_file("$FindBin::RealBin/fuzz.sql");
}

# With definitions that change while they are used
sub ddl_surroundings { return slurp_file("$FindBin::RealBin/fuzz_ddl.sql"); }

my %definition;

# The statements that make a buffer; without a name, all of them.
sub definitions
{
	my ($name) = @_;

	make_definitions() if !%definition;
	return map { @{ $definition{$_} } } defined $name ? $name : sort keys %definition;
}

sub make_definitions
{
	my $make = sub {
		my ($name, $columns, $options, @more) = @_;

		$columns = "($columns)" if $columns !~ /^PARTITION|^\(/;
		$definition{$name} = [
			"CREATE FOREIGN TABLE $name $columns SERVER statbuffer" . ($options ? " OPTIONS ($options)" : ''),
			"GRANT INSERT ON $name TO fuzz_writer",
			"GRANT SELECT ON $name TO fuzz_reader",
			@more
		];
	};
	my $take = "handler 'take', interval '10ms'";
	my $i = 0;

	# one key column, and various ways to work
	foreach my $type (@types)
	{
		my $not_null = $i % 4 == 0 ? 'NOT NULL' : '';
		my $options = join ', ', (
			"handler '" . (qw(take take_one public.take))[ $i % 3 ] . "'",
			"interval '" . (qw(0 20ms 100ms 1s 1h))[ $i % 5 ] . "'",
			"backoff '" . (qw(10ms 1s))[ $i % 2 ] . "'",
			"batch_size '" . (qw(1 1000 3))[ $i % 3 ] . "'",
			"timeout '" . (qw(200ms 2s 0))[ $i % 3 ] . "'",
			"handler_timeout '" . (qw(0 2s))[ $i % 2 ] . "'",
			"restart '" . (qw(transient transient temporary))[ $i % 3 ] . "'");

		$make->(named($_, $type), "key $type $not_null, n bigint NOT NULL DEFAULT 1", $options,
			$type eq 'integer' || $type eq 'uuid' ? 'ALTER FOREIGN TABLE ' . named($_, $type) . ' OWNER TO fuzz_owner' : ())
		  foreach $unfit{$type} ? 'k' : ('b', 'k');
		$i++;
	}

	$make->('control', 'key text NOT NULL, n bigint NOT NULL DEFAULT 1',
		"handler 'take_control', interval '100ms', backoff '20ms', batch_size '20'",
		'REVOKE INSERT ON control FROM fuzz_writer');

	# one for each client, which no one flushes
	$make->("m_$_", 'key text NOT NULL, n bigint NOT NULL DEFAULT 1', "handler 'no_such', interval '1d', shutdown '0'",
		"CREATE VIEW v_m_$_ AS SELECT * FROM m_$_") foreach 1 .. 9;

	# shapes that buffers can't have
	$make->('s_none', '');
	$make->('s_one', 'n bigint');
	$make->('s_int', 'key text, n int');
	$make->('s_domain', 'key text, n counted_bigint');
	$make->('s_generated', q{key text, g text GENERATED ALWAYS AS (key || 'x') STORED, n bigint});

	# shapes that they seldom have
	$make->('s_holed', 'gone text, a int, also_gone int, b text, n bigint DEFAULT 1', $take,
		'ALTER FOREIGN TABLE s_holed DROP COLUMN gone, DROP COLUMN also_gone');
	$make->('s_child', '() INHERITS (s_parent)', $take);
	$make->('s_partition', "PARTITION OF a_partitioned FOR VALUES IN ('x')", $take);
	$make->('s_trigger', 'key text, n bigint DEFAULT 1', $take,
		'CREATE TRIGGER b BEFORE INSERT ON s_trigger FOR EACH ROW EXECUTE FUNCTION meddle()',
		'CREATE TRIGGER a AFTER INSERT ON s_trigger FOR EACH ROW EXECUTE FUNCTION meddle()',
		'CREATE TRIGGER s AFTER INSERT ON s_trigger FOR EACH STATEMENT EXECUTE FUNCTION meddle()');
	$make->('s_plain', 'key text, n bigint DEFAULT 1', $take, 'ALTER FOREIGN TABLE s_plain ALTER key SET STORAGE PLAIN');
	$make->('s_nologin', 'key text, n bigint DEFAULT 1', $take, 'ALTER FOREIGN TABLE s_nologin OWNER TO fuzz_nologin');
	$make->('s_nohandler', 'key text, n bigint DEFAULT 1', "handler 'fleeting_take', interval '10ms'");
	$make->('s_serial', 'key serial, n bigint DEFAULT 1', $take);
	$make->('s_null', 'a text, b int, n bigint DEFAULT 1', $take);
	$make->('s_pair', 'a int, b text, n bigint DEFAULT 1', $take);
	$make->('s_many', 'a text, b date, c numeric, d int[], e comp, f boolean, n bigint DEFAULT 1', $take);
	$make->('s_wide', join(', ', map { "c$_ int" } 1 .. 1599) . ', n bigint', $take);
	$make->('s_hundred', join(', ', map { "c$_ \"char\"" } 1 .. 98) . ', n bigint DEFAULT 1', $take);

	# handlers that do what handlers should not
	$make->("r_$_", 'key text, n bigint DEFAULT 1',
		"handler 'public.rude_$_', interval '20ms', backoff '10ms', handler_timeout '500ms', batch_size '"
		  . (3, 1000, 1)[ $_ - 1 ] . "'",
		$_ == 3 ? 'ALTER FOREIGN TABLE r_3 OWNER TO fuzz_owner' : ())
	  foreach 1 .. 3;
}

1;
