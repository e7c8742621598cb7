# What the fuzz test calls: a generator of calls, in the world of FuzzWorld.pm.
#
# Calls come in units of a few messages: unit N of seed S is always the same.
# What a unit does to its session it undoes at its end, as far as it gets.

package FuzzCalls;

use strict;
use warnings;

use Exporter 'import';
use FuzzDraws;
use FuzzModel;
use FuzzSession qw(simple);
use FuzzStatements;
use FuzzStruck;
use FuzzUnits;

our @EXPORT_OK = qw(unit steady_unit);

# Do most units alter what they are working with?  It takes ddl_surroundings().
our $ddl = 0;

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

1;
