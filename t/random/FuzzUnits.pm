# Units of random calls: a few messages that belong together, such as a
# transaction, a cursor, prepared statements or calls as another role.

package FuzzUnits;

use strict;
use warnings;

use Digest::MD5 qw(md5);
use Exporter 'import';
use FuzzDraws;
use FuzzSession qw(simple extended fast_path copy_in);
use FuzzStatements;

our @EXPORT = qw(
  %function_oid altered_within as_other_role by_extended_protocol by_fast_path
  copying cursor cut_off default_buffer equal_keys internals many_keys
  many_shapes prepared several transaction with_settings
);

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

	# its rows outlive the lock on the buffer that they are rows of
	$hold = 0 if $misreading && $query =~ /^SELECT x FROM/;

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
	[ 'sb_increment(anyelement,bigint,regclass)', qw(text bigint buffer) ],
	[ 'sb_increment("char",bigint,regclass)', qw(text bigint buffer) ],
	[ 'sb_async_increment(text,bigint,regclass)', qw(text bigint buffer) ],
	[ 'sb_async_increment(anyelement,bigint,regclass)', qw(text bigint buffer) ],
	[ 'sb_count(text,regclass)', qw(text buffer) ],
	[ 'sb_count(anyelement,regclass)', qw(text buffer) ],
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

1;
