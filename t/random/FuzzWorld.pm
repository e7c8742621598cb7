# The world of random calls: roles, types, functions (in fuzz.sql and fuzz_ddl.sql)
# and buffers of many shapes.
#
# Buffers are named by what may happen to them.  `control' is only counted in
# together with a ledger, and is never truncated or altered.  Those named b_*
# keep their shape, so that they can be drained in the end.  Every other one of them,
# and of k_*, is durable, until that is altered.  What happens to
# k_*, f_*, r_* and s_* is anybody's guess.

package FuzzWorld;

use strict;
use warnings;

use Exporter 'import';
use FindBin;
use FuzzDraws;
use FuzzStatements;
use PostgreSQL::Test::Utils;

our @EXPORT = qw(roles surroundings definitions ddl_surroundings samples);

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
			"restart '" . (qw(transient transient temporary))[ $i % 3 ] . "'",
			$i % 2 ? "durable 'true'" : ());

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

	# shapes that buffers cannot have
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
	$make->('s_many', 'a text, b date, c numeric, d int[], e comp, f boolean, n bigint DEFAULT 1', "$take, durable 'true'");
	$make->('s_wide', join(', ', map { "c$_ int" } 1 .. 1599) . ', n bigint', "$take, durable 'true'");
	$make->('s_hundred', join(', ', map { "c$_ \"char\"" } 1 .. 98) . ', n bigint DEFAULT 1', $take);

	# handlers that do what handlers should not
	$make->("r_$_", 'key text, n bigint DEFAULT 1',
		"handler 'public.rude_$_', interval '20ms', backoff '10ms', handler_timeout '500ms', batch_size '"
		  . (3, 1000, 1)[ $_ - 1 ] . "'" . ($_ == 2 ? ", durable 'true'" : ''),
		$_ == 3 ? 'ALTER FOREIGN TABLE r_3 OWNER TO fuzz_owner' : ())
	  foreach 1 .. 3;
}

# Statements that make a table with a column of each type, and so many rows of
# values that keys can be.  Where there are fewer, it is null.
sub samples
{
	my ($rows) = @_;
	my @columns = map { named('some', $_) . " $_" . (/^(never_null|counted)$/ ? " DEFAULT 'x'" : '') } @types;
	my @statements = (
		'CREATE TABLE samples (id int, ' . join(', ', @columns) . ')',
		"INSERT INTO samples SELECT generate_series(1, $rows)");

	foreach my $type (@types)
	{
		my $column = named('some', $type);

		foreach my $value (@{ $values{$type} })
		{
			my $expression = $value =~ /^=(.*)/s ? "($1)::$type" : quoted($value) . "::$type";

			push @statements, 'SELECT try(' . quoted(
				"UPDATE samples SET $column = $expression WHERE id = (SELECT min(id) FROM samples WHERE $column IS NULL)"
				  . " AND length(($expression)::text) < 1000") . ', 0)';
		}
	}
	return @statements;
}

1;
